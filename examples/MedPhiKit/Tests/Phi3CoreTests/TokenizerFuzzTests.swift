import Foundation
import Testing

@testable import Phi3Core

@Suite("Tokenizers from hostile files", .enabled(if: Vectors.hasRecorded, "no checkout around"))
struct TokenizerFuzzTests {
    /// How many files and streams are tried.
    static let rounds = FileFixtures.fuzzCount(1000)

    let file: [UInt8]

    init() throws {
        file = try [UInt8](Data(contentsOf: Vectors.mini.appendingPathComponent("tokenizer.json")))
    }

    @Test("changed bytes give an error or a tokenizer, never a crash")
    func mutatedFiles() throws {
        var random = SplitMix(4)
        var loaded = 0
        for round in 0..<Self.rounds {
            let changed = mutated(file, &random)
            do {
                let tokenizer = try Tokenizer(tokenizerJSON: Data(changed))
                loaded += 1
                let ids = tokenizer.encode(random.text(upTo: 20))
                _ = tokenizer.decode(ids + [Int32(truncatingIfNeeded: random.next())])
                _ = tokenizer.encodeUnsafeRaw("<|end|> a</s>" + random.text(upTo: 9))
            } catch let error as Phi3Error {
                #expect(error.description.utf8.count < 1000, "round \(round)")
            }
        }
        #expect(loaded > 0 && loaded < Self.rounds)
    }

    @Test("changed configurations give an error or a tokenizer, never a crash")
    func mutatedConfigurations() throws {
        let config = try [UInt8](
            Data(contentsOf: Vectors.mini.appendingPathComponent("tokenizer_config.json")))
        var random = SplitMix(5)
        for _ in 0..<Self.rounds / 4 {
            let changed = Data(mutated(config, &random))
            do {
                let read = try TokenizerConfiguration(config: changed)
                let chat = [ChatMessage(role: .user, content: "a")]
                _ = try? read.chatTemplate.pieces(chat, generation: true)
            } catch is Phi3Error {}
        }
    }

    @Test("any ids are decoded to valid text, at once and one by one")
    func randomIDs() throws {
        let tokenizer = try Tokenizer(tokenizerJSON: Data(file))
        var random = SplitMix(6)
        for _ in 0..<Self.rounds {
            let ids = (0..<16).map { _ -> Int32 in
                switch random.next() % 4 {
                case 0: Int32(truncatingIfNeeded: random.next())
                case 1: Int32.random(in: 300..<330, using: &random)
                default: Int32.random(in: 0..<262, using: &random)
                }
            }
            var stream = tokenizer.streamingDecoder()
            let pieces = ids.map { stream.step($0) } + [stream.flush()]
            #expect(same(pieces.joined(), tokenizer.decode(ids)))
        }
    }

    @Test(
        "a file that computes something else is refused, by the name of the part",
        arguments: [
            (#""byte_fallback": true"#, #""byte_fallback": false"#, "model"),
            (#""dropout": null"#, #""dropout": 0.1"#, "model"),
            (
                #""pre_tokenizer": null"#, #""pre_tokenizer": {"type": "Metaspace"}"#,
                "pre_tokenizer"
            ),
            (#""prepend": "▁""#, #""prepend": " ""#, "normalizer"),
            (#""start": 1"#, #""start": 2"#, "decoder"),
            (#""lstrip": false"#, #""lstrip": true"#, "added token"),
            (#""<0x41>": "#, #""<0x4G>": "#, "<0x41>"),
            (#""id": 312"#, #""id": 320"#, "320"),
            (#""type": "BPE""#, #""type": "Unigram""#, "model"),
        ])
    func refusesOtherPipelines(_ old: String, _ new: String, _ what: String) throws {
        // The file may be written with or without spaces.
        let text = String(decoding: file, as: UTF8.self)
        let compact = (old.replacingOccurrences(of: ": ", with: ":"), new)
        let found = text.contains(old) ? old : compact.0
        let place = try #require(text.range(of: found))
        let changed = text.replacingCharacters(in: place, with: new)
        let error = #expect(throws: Phi3Error.self) {
            try Tokenizer(tokenizerJSON: Data(changed.utf8))
        }
        #expect(error?.description.contains(what) == true)
    }

    @Test("a file whose merges make an added token is refused")
    func refusesMergesToTokens() throws {
        var spec = try #require(JSONValue(parsing: file).object)
        var model = try #require(spec["model"]?.object)
        let old = try #require(model["vocab"]?.object)
        let renamed = ["<s", ">"]
        // The two last entries, under other names.
        model["vocab"] = .object(
            JSONObject(
                old.enumerated().map { at, member in
                    let late = at - (old.count - renamed.count)
                    return (name: late < 0 ? member.name : renamed[late], value: member.value)
                }))
        model["merges"] = .array([.string("<s >")])
        spec["model"] = .object(model)
        let error = #expect(throws: Phi3Error.self) {
            try Tokenizer(tokenizerJSON: Data(JSONValue.object(spec).text().utf8))
        }
        #expect(error?.description.contains("merge 0 names") == true)
    }

    /// Changes one to three places: bytes flipped, cut out, doubled, or put somewhere else.
    private func mutated(_ bytes: [UInt8], _ random: inout SplitMix) -> [UInt8] {
        var out = bytes
        for _ in 0...Int.random(in: 0..<3, using: &random) where !out.isEmpty {
            let at = Int.random(in: 0..<out.count, using: &random)
            let end = min(out.count, at + Int.random(in: 1..<24, using: &random))
            switch random.next() % 6 {
            case 0: out[at] = UInt8(truncatingIfNeeded: random.next())
            case 1: out[at] ^= 1 << UInt8(random.next() % 8)
            case 2: out.removeSubrange(at..<end)
            case 3: out.insert(contentsOf: out[at..<end], at: at)
            case 4:
                out.insert(
                    contentsOf: out[at..<end], at: Int.random(in: 0..<out.count, using: &random))
            default: out[at] = Array("0123456789\"{}[],:-".utf8).randomElement(using: &random) ?? 0
            }
        }
        return out
    }
}
