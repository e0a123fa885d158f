import Foundation
import Testing

@testable import Phi3Core

@Suite("Random cases, as the tokenizers library computes them")
struct RandomCasesTests {
    // Phi-3's tokenizer takes a while to read when nothing is optimised.
    private static let demo = Result { try load("tiny", Vectors.tiny) }
    private static let phi3 = Result { try load("phi-3-mini", Vectors.phi3) }

    private static func load(_ name: String, _ folder: URL) throws -> RandomCases {
        let cases = try RandomCases(name, Tokenizer.load(directory: folder))
        let file = try Data(contentsOf: folder.appendingPathComponent("tokenizer.json"))
        try #require(cases.tokenizerSHA256 == SHA256.hex(file), "digests of another tokenizer")
        return cases
    }

    private static func has(_ name: String) -> Bool {
        FileManager.default.fileExists(atPath: RandomCases.file(name).path)
    }

    @Test(
        "the demo tokenizer has no difference", .enabled(if: has("tiny"), "no recorded digests"),
        arguments: ["plain", "raw", "whole", "skipped", "stream", "chat"])
    func demo(_ group: String) throws { try compare(Self.demo.get(), group) }

    @Test(
        "Phi-3's has none",
        .enabled(
            if: Vectors.hasPhi3 && has("phi-3-mini"),
            "Phi-3's tokenizer is not beside the checkout"),
        arguments: ["plain", "raw", "whole", "skipped", "stream", "chat"])
    func phi3(_ group: String) throws { try compare(Self.phi3.get(), group) }

    private func compare(_ cases: RandomCases, _ group: String) throws {
        let (count, wrong) = try cases.differences(group)
        #expect(count >= 100)
        #expect(wrong.isEmpty, "\(wrong.count) of \(count), the first are \(wrong.prefix(9))")
    }
}
