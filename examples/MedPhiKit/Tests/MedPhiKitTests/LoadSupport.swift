import Foundation
import MedPhiKit
import Synchronization
import Testing

/// Where the files lie that the Python suite made.
enum Places {
    /// The folder of the whole project, five levels above this file.
    static let root = (0..<5).reduce(URL(fileURLWithPath: #filePath)) { url, _ in
        url.deletingLastPathComponent()
    }
    /// Small checkpoints.
    static let phi3 = root.appendingPathComponent("tests/fixtures/phi3")
    /// The demo's base.
    static let tiny = root.appendingPathComponent("mlx_medphi/assets/tiny")
    /// What is recorded for Swift.
    static let recorded = root.appendingPathComponent("tests/fixtures/swift")
    /// A bundle of four bits with adapter slots, of "mini-4k".
    static let mini = recorded.appendingPathComponent("mini.medphi")
    /// An adapter of the demo's base.
    static let notes = recorded.appendingPathComponent("notes.safetensors")
    /// A bundle with its adapter built in as functions, where there is one.
    static let builtIn = given("MEDPHI_BUNDLES")?.appendingPathComponent("functions.medphi")
    /// The demo's bundle, where there is one.
    static let demo = given("MEDPHI_DEMO_BUNDLE")

    private static func given(_ name: String) -> URL? {
        let path = ProcessInfo.processInfo.environment[name] ?? ""
        return path.isEmpty ? nil : URL(fileURLWithPath: path)
    }
}

/// A folder for one test.
final class Room {
    let url: URL

    init() throws {
        url = FileManager.default.temporaryDirectory.appendingPathComponent(
            "medphi-\(UUID().uuidString)")
        try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
    }

    deinit { try? FileManager.default.removeItem(at: url) }

    subscript(name: String) -> URL { url.appendingPathComponent(name) }

    /// A copy of a folder in which files can be changed.
    func copy(_ source: URL, _ name: String) throws -> URL {
        try FileManager.default.copyItem(at: source, to: self[name])
        return self[name]
    }
}

/// Replaces text in a file.
func change(_ url: URL, _ old: String, _ new: String) throws {
    let text = try String(contentsOf: url, encoding: .utf8)
    #expect(text.contains(old))
    try text.split(separator: old, omittingEmptySubsequences: false).joined(separator: new)
        .write(to: url, atomically: true, encoding: .utf8)
}

/// The error that some work ends in.
func problem(_ work: () async throws -> Void) async -> Phi3Error? {
    do {
        try await work()
        return nil
    } catch {
        return error as? Phi3Error
    }
}

/// A value that several threads change.
final class Locked<Value: Sendable>: Sendable {
    private let state: Mutex<Value>

    init(_ value: Value) { state = Mutex(value) }

    var value: Value { state.withLock { $0 } }

    func change(_ body: (inout Value) -> Void) { state.withLock { body(&$0) } }
}
