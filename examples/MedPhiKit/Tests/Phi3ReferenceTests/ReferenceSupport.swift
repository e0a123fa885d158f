import Foundation
import Phi3Core
import Testing

@testable import Phi3Reference

/// Where the files lie that the Python suite made.
enum Fixtures {
    /// The folder of the whole project, five levels above this file.
    static let root = (0..<5).reduce(URL(fileURLWithPath: #filePath)) { url, _ in
        url.deletingLastPathComponent()
    }
    /// Small checkpoints with the logits that transformers gives for them.
    static let phi3 = root.appendingPathComponent("tests/fixtures/phi3")
    /// The demo's base.
    static let tiny = root.appendingPathComponent("mlx_medphi/assets/tiny")
    /// The names of the reference folders.
    static let names = [
        "gqa", "longrope-long", "longrope-new-config", "longrope-short", "mini-4k",
        "partial-rotary-tied", "sliding-window",
    ]
    /// Adapters of the first folder: LoRA, rsLoRA and DoRA.
    static let adapters = ["peft_0", "peft_1", "peft_2"]

    /// A new folder that is removed when the test ends.
    static func temporary() throws -> TemporaryFolder { try TemporaryFolder() }
}

/// A folder for one test.
final class TemporaryFolder {
    let url: URL

    init() throws {
        url = FileManager.default.temporaryDirectory.appendingPathComponent(
            "medphi-\(UUID().uuidString)")
        try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
    }

    deinit { try? FileManager.default.removeItem(at: url) }

    subscript(name: String) -> URL { url.appendingPathComponent(name) }
}

/// What transformers gave for a folder.
struct Expected {
    let rows: [[Int32]]
    let logits: [[Float]]
    let greedy: [Int32]

    init(_ folder: URL, ids: URL? = nil) throws {
        let file = try SafetensorsFile(folder.appendingPathComponent("reference.safetensors"))
        let base = try ids.map {
            try SafetensorsFile($0.appendingPathComponent("reference.safetensors"))
        }
        let ids = try #require((base ?? file).tensor("ids"))
        let logits = try #require(file.tensor("logits"))
        let all = Expected.integers(ids)
        let numbers = logits.floats()
        let length = ids.shape[1]
        let width = numbers.count / ids.shape[0]
        rows = (0..<ids.shape[0]).map { Array(all[$0 * length..<($0 + 1) * length]) }
        self.logits = (0..<ids.shape[0]).map { Array(numbers[$0 * width..<($0 + 1) * width]) }
        greedy = file.tensor("greedy").map(Expected.integers) ?? []
    }

    static func integers(_ tensor: Tensor) -> [Int32] {
        tensor.data.withUnsafeBytes { bytes in
            (0..<bytes.count / 4).map {
                bytes.loadUnaligned(fromByteOffset: $0 * 4, as: Int32.self)
            }
        }
    }
}

/// The largest difference of two lists of the same length; infinite where they are no numbers.
func largestDifference(_ left: [Float], _ right: [Float]) -> Float {
    guard left.count == right.count else { return .infinity }
    return zip(left, right).reduce(0) {
        $1.0.isFinite && $1.1.isFinite ? max($0, abs($1.0 - $1.1)) : .infinity
    }
}

/// Continues a sequence with the likeliest id each time.
func greedily(_ model: ReferenceModel, _ prompt: [Int32], _ count: Int) throws -> [Int32] {
    var session = ReferenceSession(model)
    var ids = prompt
    for _ in 0..<count {
        let logits = try session.logits(after: ids)
        let best = logits.indices.max { logits[$0] < logits[$1] }
        ids.append(Int32(best ?? 0))
    }
    return ids
}
