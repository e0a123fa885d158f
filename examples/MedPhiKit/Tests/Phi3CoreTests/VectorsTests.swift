import Foundation
import Phi3Core
import Testing

@Suite("Vectors of the Python package", .enabled(if: Vectors.hasRecorded, "no checkout around"))
struct VectorsTests {
    @Test("every case is computed as Python does", arguments: ["tiny", "mini-4k"])
    func agrees(_ name: String) throws {
        let tokenizer = try Tokenizer.load(directory: Vectors.checkpoint(name))
        let vectors = try TokenizerVectors(Vectors.data("vectors-\(name).json"))
        #expect(try vectors.check(tokenizer) >= 200)
    }

    @Test(
        "Phi-3's own too",
        .enabled(if: Vectors.hasPhi3Vectors, "Phi-3's tokenizer, or its vectors, are not there"))
    func agreesForPhi3() throws {
        let tokenizer = try Tokenizer.load(directory: Vectors.phi3)
        let vectors = try TokenizerVectors(Vectors.data("vectors-phi-3-mini.json"))
        #expect(try vectors.check(tokenizer) >= 200)
    }

    @Test("they are of the tokenizer and template beside them")
    func hashes() throws {
        let vectors = try TokenizerVectors(Vectors.data("vectors-tiny.json"))
        let file = try Data(contentsOf: Vectors.tiny.appendingPathComponent("tokenizer.json"))
        #expect(vectors.tokenizerSHA256 == SHA256.hex(file))
        #expect(vectors.chatTemplateSHA256.count == 64)
    }

    @Test("another checkpoint's are refused")
    func refusesOthers() throws {
        let tokenizer = try Tokenizer.load(directory: Vectors.mini)
        let vectors = try TokenizerVectors(Vectors.data("vectors-tiny.json"))
        let error = #expect(throws: Phi3Error.self) { try vectors.check(tokenizer) }
        #expect(error?.description.contains("1152 ids") == true)
    }

    @Test(
        "a changed answer is named",
        arguments: [
            ("encode", #""text":"a""#, #""text":"b""#, "ids differs"),
            ("decode", #""flush":""#, #""flush":"x"#, "flush differs"),
            ("decode", #""with_special":""#, #""with_special":"x"#, "with_special differs"),
            ("chat", #""ids":["#, #""ids":[7,"#, "ids differs"),
            ("note", #""prompt":""#, #""prompt":"x"#, "prompt differs"),
            ("note", #""left_out_words":"#, #""left_out_words":1"#, "left_out_words differs"),
            ("special", #""text":"#, #""txt":"#, "no such case"),
        ])
    func namesChanges(_ group: String, _ old: String, _ new: String, _ what: String) throws {
        let text = String(decoding: try Vectors.data("vectors-tiny.json"), as: UTF8.self)
        let begin = try #require(text.range(of: "\"\(group)\":[{"))
        let place = try #require(text.range(of: old, range: begin.lowerBound..<text.endIndex))
        let changed = text.replacingCharacters(in: place, with: new)
        let vectors = try TokenizerVectors(Data(changed.utf8))
        let tokenizer = try Tokenizer.load(directory: Vectors.tiny)
        let error = #expect(throws: Phi3Error.self) { try vectors.check(tokenizer) }
        #expect(error?.description.contains("\(group)[") == true)
        #expect(error?.description.contains(what) == true)
    }

    @Test(
        "a damaged file is refused",
        arguments: ["", "[]", "{}", #"{"format": "medphi-tokenizer-vectors", "version": 2}"#])
    func refusesDamage(_ text: String) {
        #expect(throws: Phi3Error.self) { try TokenizerVectors(Data(text.utf8)) }
    }
}
