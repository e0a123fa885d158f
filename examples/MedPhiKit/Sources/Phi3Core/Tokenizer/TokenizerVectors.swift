import Foundation

/// A vectors.json: what a tokenizer does to made-up text, written by the Python package beside the
/// tokenizer for every reader to repeat.
public struct TokenizerVectors: Sendable {
    /// The sha256 of the tokenizer.json that the vectors were made with.
    public let tokenizerSHA256: String
    /// The sha256 of the chat template that they were made with.
    public let chatTemplateSHA256: String
    /// One more than the largest id.
    public let vocabularySize: Int

    private let groups: [(name: String, cases: [JSONValue])]
    private let place: String

    private static let format = "medphi-tokenizer-vectors"
    private static let version = 1

    /// Reads a vectors file.
    ///
    /// - Parameters:
    ///   - data: the file.
    ///   - place: how messages name it.
    /// - Throws: `Phi3Error.tokenizerVectors` for a damaged file or another version.
    public init(_ data: Data, place: String = "vectors.json") throws {
        let value: JSONValue
        do {
            value = try JSONValue(parsing: data)
        } catch {
            throw problem(place, "damaged (not JSON)", "a vectors file")
        }
        guard value["format"]?.string == Self.format, value["version"]?.integer == Self.version
        else {
            throw problem(place, "another format", "\(Self.format), version \(Self.version)")
        }
        guard let tokenizer = value["tokenizer_sha256"]?.string,
            let template = value["chat_template_sha256"]?.string,
            let size = value["vocab_size"]?.integer
        else { throw problem(place, "damaged (no hashes)", "a vectors file") }
        groups = try ["encode", "special", "decode", "chat", "note"].map { name in
            guard let cases = value[name]?.array, !cases.isEmpty else {
                throw problem(place, "damaged (no cases '\(name)')", "a vectors file")
            }
            return (name, cases)
        }
        (tokenizerSHA256, chatTemplateSHA256, vocabularySize) = (tokenizer, template, size)
        self.place = place
    }

    /// Computes every case again.
    ///
    /// - Returns: how many cases there are; all of them agree.
    /// - Throws: `Phi3Error.tokenizerVectors`: the first case that differs, by its name.
    public func check(_ tokenizer: Tokenizer) throws -> Int {
        guard tokenizer.vocabularySize == vocabularySize else {
            throw problem(place, "\(vocabularySize) ids", "\(tokenizer.vocabularySize) ids")
        }
        for (name, cases) in groups {
            for (at, item) in cases.enumerated() {
                let shown = "\(name)[\(at)], '\(printable(item["name"]?.string ?? ""))'"
                do {
                    if let key = try VectorCase(item).difference(name, tokenizer) {
                        throw problem(place, "\(shown): \(key) differs", "what the file says")
                    }
                } catch is VectorCase.Malformed {
                    throw problem(place, "\(shown) is no such case", "a vectors file")
                }
            }
        }
        return groups.map(\.cases.count).reduce(0, +)
    }
}

private func problem(_ place: String, _ found: String, _ expected: String) -> Phi3Error {
    .tokenizerVectors(
        ErrorDetails(
            place: place, found: found, expected: expected,
            advice: "The tokenizer is not the one that the file was made with; fetch or export the "
                + "bundle again."))
}

/// One case, and the first key of it that a tokenizer computes differently.
private struct VectorCase {
    struct Malformed: Error {}

    let value: JSONValue

    init(_ value: JSONValue) { self.value = value }

    func difference(_ group: String, _ tokenizer: Tokenizer) throws -> String? {
        switch group {
        case "encode": try encode(tokenizer)
        case "special": try equal("ids", tokenizer.encodeUnsafeRaw(text("text")))
        case "decode": try decode(tokenizer)
        case "chat": try chat(tokenizer)
        default: try note(tokenizer)
        }
    }

    private func encode(_ tokenizer: Tokenizer) throws -> String? {
        let found = try tokenizer.encode(text("text"))
        if let key = try equal("ids", found) { return key }
        let back = tokenizer.decode(found, skipSpecial: false)
        return try equal(value["decoded"] == nil ? "text" : "decoded", back)
    }

    private func decode(_ tokenizer: Tokenizer) throws -> String? {
        let given = try ids("ids")
        var stream = tokenizer.streamingDecoder()
        let pieces = given.map { stream.step($0) }
        let flushed = stream.flush()
        let expected = try list("pieces").map { try unwrap($0.string) }
        guard same(pieces, expected) else { return "pieces" }
        return try equal("flush", flushed) ?? equal("text", tokenizer.decode(given))
            ?? equal("with_special", tokenizer.decode(given, skipSpecial: false))
    }

    private func chat(_ tokenizer: Tokenizer) throws -> String? {
        let messages = try list("messages").map { item in
            ChatMessage(
                role: try unwrap(item["role"]?.string.flatMap(ChatRole.init)),
                content: try unwrap(item["content"]?.string))
        }
        let generation = try unwrap(value["generation"]?.bool)
        return try equal("ids", tokenizer.encodeChat(messages, generation: generation))
    }

    private func note(_ tokenizer: Tokenizer) throws -> String? {
        let conversation = Conversation(
            turns: try list("turns").map { item in
                try Turn(
                    speaker: unwrap(item["speaker"]?.string), text: unwrap(item["text"]?.string))
            })
        let section = value["section"]?.string
        let made = try tokenizer.encodePrompt(
            conversation, section: section, maxLength: number("max_length"),
            reserve: number("reserve"))
        let prompt = try NotePrompt.user(conversation: conversation.text, section: section)
        if let key = try equal("prompt", prompt) ?? equal("ids", made.ids) { return key }
        if try made.leftOutTurns != number("left_out_turns") { return "left_out_turns" }
        return try made.leftOutWords == number("left_out_words") ? nil : "left_out_words"
    }

    private func equal(_ key: String, _ found: [Int32]) throws -> String? {
        try ids(key) == found ? nil : key
    }

    private func equal(_ key: String, _ found: String) throws -> String? {
        try same([text(key)], [found]) ? nil : key
    }

    /// Scalar by scalar: texts that only look alike are different.
    private func same(_ left: [String], _ right: [String]) -> Bool {
        left.count == right.count && zip(left, right).allSatisfy { $0.utf8.elementsEqual($1.utf8) }
    }

    private func unwrap<Value>(_ value: Value?) throws -> Value {
        guard let value else { throw Malformed() }
        return value
    }

    private func text(_ key: String) throws -> String { try unwrap(value[key]?.string) }

    private func number(_ key: String) throws -> Int { try unwrap(value[key]?.integer) }

    private func list(_ key: String) throws -> [JSONValue] { try unwrap(value[key]?.array) }

    private func ids(_ key: String) throws -> [Int32] {
        try list(key).map { try unwrap($0.integer.flatMap { Int32(exactly: $0) }) }
    }
}
