import Foundation
import Testing

@testable import Phi3Core

@Suite("Tokenizer", .enabled(if: Vectors.hasRecorded, "no checkout around"))
struct TokenizerTests {
    let tiny: Tokenizer

    init() throws { tiny = try Tokenizer.load(directory: Vectors.tiny) }

    @Test("text comes back from its ids, scalar by scalar")
    func roundTrip() {
        var random = SplitMix(1)
        for _ in 0..<2000 {
            let text = random.text(upTo: 30)
            let back = tiny.decode(tiny.encode(text), skipSpecial: false)
            // The mark that stands for a space comes back as one.
            let expected = text.unicodeScalars.map { $0 == "\u{2581}" ? " " : $0 }
            #expect(same(back, String(scalars: expected)))
        }
    }

    @Test("merges are taken by rank, then from the left")
    func mergesByRank() throws {
        let file = try Data(contentsOf: Vectors.tiny.appendingPathComponent("tokenizer.json"))
        let naive = try NaiveEncoder(file)
        var random = SplitMix(2)
        let words = ["the ", "patient", "has", " fever", "\n", "and", "  ", "er", "é", "😀"]
        for _ in 0..<300 {
            let text = (0..<8).map { _ in words.randomElement(using: &random) ?? "" }.joined()
            #expect(tiny.encode(text) == naive.encode(text))
        }
    }

    @Test("a consultation is encoded in time that grows with its length, not its square")
    func longText() {
        let line = "Doctor: And how long has the chest pain been there, would you say?\n"
        func seconds(_ lines: Int) -> Double {
            let text = String(repeating: line, count: lines)
            return (0..<3).map { _ in processorSeconds { _ = tiny.encode(text) } }.min() ?? 0
        }
        // Quadratic time would be 64 times as long.
        #expect(seconds(400) < 24 * seconds(50))
    }

    @Test("ids that arrive one by one give the text of all of them")
    func streaming() {
        var random = SplitMix(3)
        for _ in 0..<2000 {
            let last = Int32(random.next() % 2 == 0 ? 1300 : 262)
            let ids = (0..<20).map { _ in Int32.random(in: 0..<last, using: &random) }
            for skip in [true, false] {
                var stream = tiny.streamingDecoder(skipSpecial: skip)
                let pieces = ids.map { stream.step($0) } + [stream.flush()]
                #expect(same(pieces.joined(), tiny.decode(ids, skipSpecial: skip)))
            }
        }
    }

    @Test("a long run of bytes is given out once, in time that grows with its length")
    func longRuns() {
        func seconds(_ count: Int) -> Double {
            let ids = tiny.encode(String(repeating: "🦙", count: count))
            var stream = tiny.streamingDecoder()
            var pieces: [String] = []
            let time = processorSeconds {
                pieces = ids.map { stream.step($0) } + [stream.flush()]
            }
            #expect(pieces.joined().utf8.count == 4 * count)
            #expect(pieces.filter { !$0.isEmpty }.count == 1)
            return time
        }
        // Quadratic time would be 256 times as long.
        #expect(seconds(8_000) < 64 * max(seconds(500), 1e-4))
    }

    @Test("a line break and an emoji come when the next word does")
    func streamingHoldsBytes() {
        let ids = tiny.encode("a\n🦙b")
        var stream = tiny.streamingDecoder()
        let pieces = ids.map { stream.step($0) } + [stream.flush()]
        #expect(pieces.filter { !$0.isEmpty } == ["a", "\n🦙b"])
    }

    @Test("an emoji at the end is not lost, and half of one is U+FFFD for each byte")
    func flush() {
        let ids = tiny.encode("🦙")
        #expect(tiny.decode(ids) == "🦙")
        #expect(tiny.decode(ids.dropLast()) == "\u{FFFD}\u{FFFD}\u{FFFD}")
    }

    @Test("unknown ids give nothing", arguments: [Int32.min, -1, 1152, Int32.max])
    func unknownIDs(_ id: Int32) {
        #expect(tiny.decode([id], skipSpecial: false).isEmpty)
        #expect(tiny.entry(id) == nil)
        // They do not part the bytes of a character either.
        let ids = tiny.encode("🦙")
        #expect(tiny.decode(ids.flatMap { [$0, id] }) == "🦙")
    }

    @Test("every entry of the vocabulary is its own text")
    func entries() {
        var seen: Set<[UInt8]> = []
        for id in 0..<Int32(tiny.vocabularySize) {
            #expect(seen.insert(Array((tiny.entry(id) ?? "").utf8)).inserted)
        }
        #expect(seen.count == 1152)
    }

    @Test("the ids that end a text are those of every file")
    func stopIDs() {
        #expect(tiny.stopIDs.contains(tiny.endID) && tiny.stopIDs.contains(tiny.eosID))
        #expect(
            [tiny.bosID, tiny.userID, tiny.assistantID, tiny.systemID] == [1, 1151, 1142, 1147])
    }

    @Test("the rows of a padded embedding are those behind the last id")
    func padding() {
        #expect(tiny.paddingIDs(rows: 1200) == 1152...1199)
        for rows in [1152, 0, Int.min, Int.max] { #expect(tiny.paddingIDs(rows: rows) == nil) }
    }

    @Test("a missing folder is said by its name")
    func missingFolder() {
        let error = #expect(throws: Phi3Error.self) {
            try Tokenizer.load(directory: URL(fileURLWithPath: "/nowhere"))
        }
        #expect(error?.description.contains("/nowhere/tokenizer_config.json: no such file") == true)
    }
}

@Suite("Phi-3's tokenizer", .enabled(if: Vectors.hasPhi3, "Phi-3's tokenizer is not there"))
struct TokenizerPhi3Tests {
    @Test("gives llama.cpp's ids, and canonically equal entries have ids of their own")
    func phi3() throws {
        let tokenizer = try Tokenizer.load(directory: Vectors.phi3)
        let texts = try text("llama.cpp-vectors.inp").components(
            separatedBy: "\n__ggml_vocab_test__\n")
        let lines = try text("llama.cpp-vectors.out").components(separatedBy: "\n")
        #expect(texts.count >= 47 && lines.count >= 47)
        for (text, line) in zip(texts, lines) {
            let expected = line.split(separator: " ").compactMap { Int32($0) }
            #expect(tokenizer.encode(text) == expected)
        }
        let pairs = [
            "\u{3AC}\u{1F71}", "\u{3AD}\u{1F73}", "\u{3AE}\u{1F75}", "\u{3AF}\u{1F77}",
            "\u{3CC}\u{1F79}", "\u{3CD}\u{1F7B}",
        ]
        let ids = pairs.flatMap { $0.unicodeScalars.map { tokenizer.encode(String($0)) } }
        #expect(Set(ids).count == 12)
        #expect(ids.allSatisfy { $0.count == 2 })
        #expect(tokenizer.stopIDs == [32000, 32007])
    }

    private func text(_ name: String) throws -> String {
        let data = try Data(contentsOf: Vectors.phi3.appendingPathComponent(name))
        return String(decoding: data, as: UTF8.self)
    }
}

@Suite("Tokenizer tables")
struct TokenizerTableTests {
    private let bytes = (0...255).map { Vocabulary.byteEntry(UInt8($0)) }

    @Test("of two added tokens at one place the longer is taken")
    func longest() throws {
        let tokens = [("<a", 1), ("<a>", 2), ("<a>b", 3)].map {
            AddedToken(id: $0.1, content: Array($0.0.utf8), stripsRight: false)
        }
        for given in [tokens, tokens.reversed()] {
            let added = AddedTokens(given)
            let found = Array("<a>x<a".utf8).withUnsafeBufferPointer { text in
                [0, 1, 4].map { added.token(in: text, at: $0)?.id }
            }
            #expect(found == [2, nil, 1])
        }
    }

    @Test("plain text cannot become an added token by a merge, nor by a scalar of its own")
    func excluded() throws {
        let entries = bytes + ["a", "b", "ab"].map { Array($0.utf8) }
        let vocabulary = try #require(Vocabulary(entries: entries))
        let merge = (entries[256], entries[257])
        let text = Array("ab".utf8)
        func ids(_ excluded: Set<Int32>, _ merges: [([UInt8], [UInt8])]) throws -> [Int32] {
            let encoder = try BytePairEncoder(vocabulary, excluding: excluded, merges: merges)
            var ids: [Int32] = []
            text.withUnsafeBufferPointer { encoder.encode($0, into: &ids) }
            return ids
        }
        let mark: [Int32] = [0xE2, 0x96, 0x81]
        #expect(try ids([], [merge]) == mark + [258])
        #expect(try ids([257], []) == mark + [256, 0x62])
        #expect(throws: BytePairEncoder.Problem.self) { try ids([258], [merge]) }
    }

    @Test("an entry that comes twice, or a byte without one, is refused")
    func damaged() throws {
        #expect(Vocabulary(entries: bytes + [bytes[7]]) == nil)
        let few = try #require(Vocabulary(entries: Array(bytes.dropLast())))
        #expect(throws: BytePairEncoder.Problem.self) {
            try BytePairEncoder(few, excluding: [], merges: [])
        }
    }
}

/// Byte-pair encoding as slow and plain as it can be written: the whole word is searched for each
/// merge.
private struct NaiveEncoder {
    private var ids: [[UInt8]: Int32] = [:]
    private var ranks: [[[UInt8]]: Int] = [:]

    init(_ file: Data) throws {
        let model = try #require(try JSONValue(parsing: file)["model"])
        for (name, value) in try #require(model["vocab"]?.object) {
            ids[Array(name.utf8)] = try Int32(#require(value.integer))
        }
        for (rank, merge) in try #require(model["merges"]?.array).enumerated() {
            let text = try #require(merge.string)
            ranks[text.utf8.split(separator: 0x20).map { Array($0) }] = rank
        }
    }

    func encode(_ text: String) -> [Int32] {
        let spaced = "▁" + text.replacingOccurrences(of: " ", with: "▁")
        var word = spaced.unicodeScalars.flatMap { scalar -> [[UInt8]] in
            let bytes = Array(String(scalar).utf8)
            return ids[bytes] != nil
                ? [bytes] : bytes.map { Array(String(format: "<0x%02X>", $0).utf8) }
        }
        while true {
            let pairs = word.indices.dropLast().compactMap { at in
                ranks[[word[at], word[at + 1]]].map { ($0, at) }
            }
            guard let (_, at) = pairs.min(by: <) else { return word.compactMap { ids[$0] } }
            word.replaceSubrange(at...at + 1, with: [word[at] + word[at + 1]])
        }
    }
}
