import Foundation
import Phi3Core
import Phi3Reference
import Testing

@testable import Phi3CoreML

/// Where the files lie that the Python suite made.
enum Fixtures {
    /// The folder of the whole project, five levels above this file.
    static let root = (0..<5).reduce(URL(fileURLWithPath: #filePath)) { url, _ in
        url.deletingLastPathComponent()
    }
    /// Small checkpoints that transformers made.
    static let phi3 = root.appendingPathComponent("tests/fixtures/phi3")
    /// One of them, with PEFT adapters inside.
    static let mini = phi3.appendingPathComponent("mini-4k")

    /// A bundle that was exported, named by the environment.
    static let demo = ProcessInfo.processInfo.environment["MEDPHI_DEMO_BUNDLE"]
        .map { URL(fileURLWithPath: $0) }

    /// Ids that follow from a number, the same in every run.
    static func ids(_ count: Int, seed: UInt64 = 1, below most: UInt64 = 300) -> [Int32] {
        var state = seed &* 0x9E37_79B9_7F4A_7C15 | 1
        return (0..<count).map { _ in
            state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
            return Int32((state >> 33) % most)
        }
    }
}

/// A folder for one test, removed when the test ends.
final class TestFolder: Sendable {
    let url: URL

    init() throws {
        url = FileManager.default.temporaryDirectory.appendingPathComponent(
            "medphi-\(UUID().uuidString)")
        try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
    }

    deinit { try? FileManager.default.removeItem(at: url) }

    subscript(name: String) -> URL { url.appendingPathComponent(name) }
}

/// How far logits of a package may be from those of the processor backend, in parts of the largest:
/// keys, values and logits are rounded to half precision, and four of its steps of 2⁻¹¹ are allowed.
let halfPrecision: Float = 4 / 2048

/// The largest difference of two rows, in parts of the largest number; infinite where they are none.
func difference(_ found: [Float], _ wanted: [Float]) -> Float {
    guard found.count == wanted.count, !wanted.isEmpty else { return .infinity }
    let scale = wanted.reduce(Float(1e-6)) { max($0, abs($1)) }
    return zip(found, wanted).reduce(0) {
        $1.0.isFinite && $1.1.isFinite ? max($0, abs($1.0 - $1.1) / scale) : .infinity
    }
}

/// The processor backend's logits after a sequence.
func reference(_ ids: [Int32], _ model: ReferenceModel) throws -> [Float] {
    var session = ReferenceSession(model)
    return try session.logits(after: ids)
}

/// The error of this package that some work throws.
func failure(of work: () async throws -> Void) async -> Phi3Error? {
    do {
        try await work()
        return nil
    } catch {
        return error as? Phi3Error
    }
}
