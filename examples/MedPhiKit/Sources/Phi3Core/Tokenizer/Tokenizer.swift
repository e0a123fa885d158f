import Foundation

/// Text to ids and back, as one checkpoint's own tokenizer.json does it.
///
/// Text becomes ids without any added token: whatever its words are, text inside a conversation
/// cannot become `<|end|>`, `</s>` or another token. For other text the ids are the file's own,
/// those of the `tokenizers` library. A value is cheap to copy and may be used from any thread.
///
/// ```swift
/// let tokenizer = try Tokenizer.load(directory: folder)
/// let ids = tokenizer.encode("Doctor: how are you?")
/// tokenizer.decode(ids)  // "Doctor: how are you?"
/// ```
public struct Tokenizer: Sendable {
    /// Everything that is made once; a tokenizer is passed around as one reference.
    private final class Tables: Sendable {
        let file: TokenizerFile
        let configuration: TokenizerConfiguration

        init(_ file: TokenizerFile, _ configuration: TokenizerConfiguration) {
            self.file = file
            self.configuration = configuration
        }
    }

    private let tables: Tables
    /// One more than the largest id; a model's embedding may be larger.
    public let vocabularySize: Int
    /// `<s>`, which Phi-3's chats do not use.
    public let bosID: Int32
    /// `<|endoftext|>`, which closes a chat.
    public let eosID: Int32
    /// The id that stands for nothing in a batch.
    public let padID: Int32
    /// `<|end|>`, behind every message.
    public let endID: Int32
    /// `<|user|>`.
    public let userID: Int32
    /// `<|assistant|>`.
    public let assistantID: Int32
    /// `<|system|>`.
    public let systemID: Int32
    /// What ends a generation, sorted: the configured ids, `<|end|>` and `<|endoftext|>`.
    public let stopIDs: [Int32]

    /// The files of a tokenizer that this package reads or that go with it, tokenizer.json first.
    public static let fileNames = [
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
        "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    ]

    /// Reads the tokenizer files of a checkpoint's folder.
    ///
    /// - Throws: `Phi3Error.tokenizer` or `.chatTemplate`: a file is missing or damaged, or it is
    ///   not of the Phi-3 family.
    public static func load(directory: URL) throws -> Tokenizer {
        func read(_ name: String) throws -> Data? {
            let file = directory.appendingPathComponent(name)
            guard FileManager.default.fileExists(atPath: file.path) else { return nil }
            try FileBytes.refusePointer(file)
            do {
                return try Data(contentsOf: file, options: .mappedIfSafe)
            } catch {
                throw missing(file.path, "cannot be read (\(error.localizedDescription))")
            }
        }
        func needed(_ name: String) throws -> Data {
            guard let data = try read(name) else {
                throw missing(directory.appendingPathComponent(name).path, "no such file")
            }
            return data
        }
        let configuration = try TokenizerConfiguration(
            config: needed("tokenizer_config.json"), template: read("chat_template.jinja"),
            generation: read("generation_config.json"), place: directory.path)
        return try Tokenizer(
            tokenizerJSON: needed("tokenizer.json"), configuration: configuration,
            place: directory.appendingPathComponent("tokenizer.json").path)
    }

    /// Makes a tokenizer from a file's bytes and what a manifest or other files say besides.
    ///
    /// - Parameters:
    ///   - tokenizerJSON: tokenizer.json as it is.
    ///   - configuration: its tokens and the structure of its chats.
    ///   - place: how messages name the file.
    /// - Throws: `Phi3Error.tokenizer`: the file is damaged, computes something else than Phi-3's,
    ///   or lacks a token of Phi-3's chats.
    public init(
        tokenizerJSON: Data, configuration: TokenizerConfiguration = .init(),
        place: String = "tokenizer.json"
    ) throws {
        let file = try TokenizerFile(json: Array(tokenizerJSON), place: place)
        let added = file.added
        func id(_ token: String) throws -> Int32 {
            guard let found = added[token] else { throw Tokenizer.lacks([token], place) }
            return found.id
        }
        let template = configuration.chatTemplate
        for token in [template.opening, template.closing] where !token.isEmpty { _ = try id(token) }
        let wrong = configuration.stopIDs.filter { !file.vocabulary.contains($0) }
        guard wrong.isEmpty else { throw Tokenizer.lacks(wrong.map(String.init), place) }
        tables = Tables(file, configuration)
        vocabularySize = file.vocabulary.count
        bosID = try id(configuration.bosToken)
        eosID = try id(configuration.eosToken)
        padID = configuration.padToken.flatMap { added[$0]?.id } ?? eosID
        endID = try id(ChatTemplate.end)
        userID = try id(ChatRole.user.token)
        assistantID = try id(ChatRole.assistant.token)
        systemID = try id(ChatRole.system.token)
        let endOfText = added[ChatTemplate.endOfText].map { [$0.id] } ?? []
        stopIDs = Set(configuration.stopIDs + [endID, eosID] + endOfText).sorted()
        try prove(place)
    }

    /// The structure of this tokenizer's chats.
    public var chatTemplate: ChatTemplate { tables.configuration.chatTemplate }

    /// Every added token's id.
    public var addedIDs: Set<Int32> { tables.file.added.ids }

    /// The rows of a model's embedding behind the last id, which a sampler must suppress; nil when
    /// there are none.
    public func paddingIDs(rows: Int) -> ClosedRange<Int32>? {
        guard rows > 0, let last = Int32(exactly: rows - 1), last >= vocabularySize else {
            return nil
        }
        return Int32(vocabularySize)...last
    }

    /// Ids of plain text; never an added token.
    public func encode(_ text: String) -> [Int32] {
        var ids: [Int32] = []
        var text = text
        text.withUTF8 { tables.file.encoder.encode($0, into: &ids) }
        return ids
    }

    /// Ids by the file's own pipeline, where `<|end|>` in the text becomes that token.
    ///
    /// For comparing with a rendered chat template only. A conversation in such a text could forge
    /// the end of its message: build chats with `encodeChat(_:generation:)`.
    public func encodeUnsafeRaw(_ text: String) -> [Int32] {
        var ids: [Int32] = []
        var text = text
        text.withUTF8 { whole in
            var begin = 0
            var at = 0
            while at < whole.count {
                guard let token = tables.file.added.token(in: whole, at: at) else {
                    at += 1
                    continue
                }
                tables.file.encoder.encode(part(whole, begin, at), into: &ids)
                ids.append(token.id)
                at += token.content.count
                if token.stripsRight { at = WhiteSpace.end(in: whole, from: at) }
                begin = at
            }
            tables.file.encoder.encode(part(whole, begin, whole.count), into: &ids)
        }
        return ids
    }

    /// Text of ids; ids that the tokenizer does not know give nothing.
    ///
    /// - Parameter skipSpecial: leave out the added tokens, also those that the file does not call
    ///   special.
    public func decode(_ ids: some Sequence<Int32>, skipSpecial: Bool = true) -> String {
        var stream = streamingDecoder(skipSpecial: skipSpecial)
        var out: [UInt8] = []
        for id in ids { stream.step(id, into: &out) }
        stream.flush(into: &out)
        return String(decoding: out, as: UTF8.self)
    }

    /// A decoder for ids that arrive one by one.
    public func streamingDecoder(skipSpecial: Bool = true) -> StreamingDecoder {
        StreamingDecoder(tables.file.vocabulary, skipping: skipSpecial ? addedIDs : [])
    }

    /// The entry of an id as it stands in the file, `▁` for a space; nil for an unknown id.
    public func entry(_ id: Int32) -> String? {
        let vocabulary = tables.file.vocabulary
        guard vocabulary.contains(id) else { return nil }
        return String(decoding: vocabulary.entries[Int(id)], as: UTF8.self)
    }

    func addedToken(_ content: String) -> AddedToken? { tables.file.added[content] }

    /// Ids of plain text that stands behind a token which may swallow white space.
    func encode(_ text: String, behind token: AddedToken?, into ids: inout [Int32]) {
        var text = text
        text.withUTF8 { whole in
            let begin = token?.stripsRight == true ? WhiteSpace.end(in: whole, from: 0) : 0
            tables.file.encoder.encode(part(whole, begin, whole.count), into: &ids)
        }
    }

    private static func missing(_ path: String, _ found: String) -> Phi3Error {
        .tokenizer(
            ErrorDetails(
                place: path, found: found,
                expected: "a folder with tokenizer.json and tokenizer_config.json",
                advice: "Copy both from the base model."))
    }

    private static func lacks(_ tokens: [String], _ place: String) -> Phi3Error {
        .tokenizer(
            ErrorDetails(
                place: place, found: "no token \(capped(tokens))",
                expected: "the tokens of a Phi-3 chat",
                advice: "Take the tokenizer files from a Phi-3 checkpoint."))
    }
}

private func part(
    _ text: UnsafeBufferPointer<UInt8>, _ begin: Int, _ end: Int
) -> UnsafeBufferPointer<UInt8> {
    UnsafeBufferPointer(rebasing: text[begin..<end])
}
