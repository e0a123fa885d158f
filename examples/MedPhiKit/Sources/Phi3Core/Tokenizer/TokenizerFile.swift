/// What tokenizer.json says, checked to be a pipeline that this package computes exactly.
struct TokenizerFile: Sendable {
    let vocabulary: Vocabulary
    let added: AddedTokens
    let encoder: BytePairEncoder

    /// The largest file that is read, in bytes; Phi-3's has 1.8 million.
    static let largest = 64 << 20

    /// - Parameters:
    ///   - json: the file.
    ///   - place: how messages name it.
    /// - Throws: `Phi3Error.tokenizer` for another pipeline, a damaged file, or ids with gaps.
    init(json: [UInt8], place: String) throws {
        guard json.count <= Self.largest else {
            throw damaged(place, "\(json.count) bytes, more than any Phi-3 tokenizer has")
        }
        let spec: JSONValue
        do {
            spec = try JSONValue(parsing: json)
        } catch let problem as JSONSyntaxError {
            throw damaged(place, problem.description)
        }
        guard let model = spec["model"], let entries = model["vocab"]?.object, !entries.isEmpty
        else { throw damaged(place, "no vocabulary") }
        try Self.checkPipeline(spec, place)
        try Self.checkModel(model, place)
        let words = try Self.words(entries, place)
        let tokens = try Self.addedTokens(spec["added_tokens"], words: words, place)
        let more = tokens.filter { Int($0.id) >= words.count }.map(\.content)
        guard let vocabulary = Vocabulary(entries: words + more) else {
            throw damaged(place, "an entry comes twice")
        }
        added = AddedTokens(tokens)
        self.vocabulary = vocabulary
        do {
            encoder = try BytePairEncoder(
                vocabulary, excluding: added.ids, merges: try Self.merges(model["merges"], place))
        } catch let problem as BytePairEncoder.Problem {
            throw damaged(place, problem.what)
        }
    }

    private static func checkPipeline(_ spec: JSONValue, _ place: String) throws {
        let normalizers = spec["normalizer"]?["normalizers"]?.array ?? []
        guard spec["normalizer"]?["type"]?.string == "Sequence", normalizers.count == 2,
            normalizers[0]["type"]?.string == "Prepend", isMark(normalizers[0]["prepend"]),
            normalizers[1]["type"]?.string == "Replace",
            normalizers[1]["pattern"]?["String"]?.string == " ", isMark(normalizers[1]["content"])
        else {
            throw foreign(place, "normalizer", "one that puts ▁ before the text and for spaces")
        }
        guard spec["pre_tokenizer"]?.isNull ?? true else {
            throw foreign(place, "pre_tokenizer", "none")
        }
        let steps = spec["decoder"]?["decoders"]?.array ?? []
        let kinds = steps.map { $0["type"]?.string ?? "" }
        guard spec["decoder"]?["type"]?.string == "Sequence",
            kinds == ["Replace", "ByteFallback", "Fuse", "Strip"],
            isMark(steps[0]["pattern"]?["String"]), steps[0]["content"]?.string == " ",
            steps[3]["content"]?.string == " ", steps[3]["start"]?.integer == 1,
            steps[3]["stop"]?.integer == 0
        else { throw foreign(place, "decoder", "Replace, ByteFallback, Fuse, Strip") }
    }

    private static func checkModel(_ model: JSONValue, _ place: String) throws {
        func isAbsent(_ name: String) -> Bool {
            guard let value = model[name] else { return true }
            return !value.isTruthy
        }
        guard model["type"]?.string ?? "BPE" == "BPE", model["byte_fallback"]?.bool == true,
            isAbsent("dropout"), isAbsent("continuing_subword_prefix"),
            isAbsent("end_of_word_suffix"), isAbsent("ignore_merges")
        else { throw foreign(place, "model", "byte pairs with byte fallback and no other option") }
    }

    /// The entries of the vocabulary in the order of their ids.
    private static func words(_ entries: JSONObject, _ place: String) throws -> [[UInt8]] {
        var words = [[UInt8]?](repeating: nil, count: entries.count)
        for (text, value) in entries {
            guard let id = value.integer, words.indices.contains(id), words[id] == nil else {
                throw damaged(place, "ids of the vocabulary are not the numbers from 0, each once")
            }
            words[id] = Array(text.utf8)
        }
        return words.compactMap { $0 }
    }

    private static func addedTokens(
        _ value: JSONValue?, words: [[UInt8]], _ place: String
    ) throws -> [AddedToken] {
        guard let items = value?.array, !items.isEmpty else {
            throw damaged(place, "no added_tokens")
        }
        let names = Set(items.compactMap { $0["content"]?.string.map { Array($0.utf8) } })
        let known = words.enumerated().reduce(into: [[UInt8]: Int]()) { known, word in
            if names.contains(word.element) { known[word.element] = word.offset }
        }
        var contents: Set<[UInt8]> = []
        var next = words.count
        return try items.map { item in
            guard let text = item["content"]?.string, let id = item["id"]?.integer else {
                throw damaged(place, "added_tokens is not a list of objects with id and content")
            }
            let content = Array(text.utf8)
            // A longer list of the library's rules: no such token exists in a Phi-3 tokenizer.
            guard text.unicodeScalars.count > 1, contents.insert(content).inserted,
                item["single_word"]?.bool == false, item["lstrip"]?.bool == false,
                item["normalized"]?.bool == false, let stripsRight = item["rstrip"]?.bool
            else { throw foreign(place, "added token of id \(id)", "one of Phi-3's form") }
            guard id == known[content] ?? next else {
                throw damaged(place, "an added token has id \(id), not \(known[content] ?? next)")
            }
            if known[content] == nil { next += 1 }
            return AddedToken(id: Int32(id), content: content, stripsRight: stripsRight)
        }
    }

    /// Pairs, written as "a b" or as ["a", "b"].
    private static func merges(
        _ value: JSONValue?, _ place: String
    ) throws -> [([UInt8], [UInt8])] {
        guard let items = value?.array else { throw damaged(place, "no merges") }
        let space = UInt8(ascii: " ")
        // As in the reference: an old file's header line is no merge.
        let lines = items.filter { !($0.string?.utf8.starts(with: "#version".utf8) ?? false) }
        return try lines.enumerated().map { rank, item in
            if let pair = item.array, pair.count == 2, let left = pair[0].string,
                let right = pair[1].string
            {
                return (Array(left.utf8), Array(right.utf8))
            }
            let parts = item.string?.utf8.split(separator: space, omittingEmptySubsequences: false)
            guard let parts, parts.count == 2 else {
                throw damaged(place, "merge \(rank) is no pair of entries")
            }
            return (Array(parts[0]), Array(parts[1]))
        }
    }

    private static func isMark(_ value: JSONValue?) -> Bool {
        value?.string.map { Array($0.utf8) == Vocabulary.spaceMark } ?? false
    }
}

private func damaged(_ place: String, _ what: String) -> Phi3Error {
    .tokenizer(
        ErrorDetails(
            place: place, found: "damaged (\(what))",
            expected: "the tokenizer.json of a Phi-3 model",
            advice: "Copy it again from the base model, byte for byte."))
}

private func foreign(_ place: String, _ part: String, _ expected: String) -> Phi3Error {
    .tokenizer(
        ErrorDetails(
            place: place, found: "a \(part) that this package does not compute", expected: expected,
            advice: "Take the tokenizer files from a Phi-3 checkpoint."))
}
