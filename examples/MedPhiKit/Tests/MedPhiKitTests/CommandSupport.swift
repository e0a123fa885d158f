import Foundation
import Synchronization

@testable import MedPhiKitCommand

/// Runs the command as a shell would, and keeps what it prints.
struct CommandRun {
    let code: Int32
    let output: String
    let errors: String

    /// The one line that says what went wrong; empty where there are several or none.
    var problem: String {
        let lines = errors.split(separator: "\n").filter { $0.hasPrefix("error: ") }
        let isLast = errors.hasSuffix("\n") && errors.split(separator: "\n").last == lines.last
        return lines.count == 1 && isLast ? String(lines[0].dropFirst(7)) : ""
    }

    static func of(_ arguments: String..., input: Data = Data()) async -> CommandRun {
        await of(arguments, input: input)
    }

    static func of(
        _ arguments: [String], input: Data = Data(),
        watch: @escaping @Sendable (String) -> Void = { _ in }
    ) async -> CommandRun {
        let output = Collected()
        let errors = Collected()
        let code = await MedPhiKitCommand.run(
            arguments: arguments, input: { input },
            output: { text in
                output.add(text)
                watch(text)
            }, errors: { errors.add($0) })
        return CommandRun(code: code, output: output.text, errors: errors.text)
    }
}

private final class Collected: Sendable {
    private let state = Mutex("")
    func add(_ text: String) { state.withLock { $0 += text } }
    var text: String { state.withLock { $0 } }
}

/// Files the tests of the command read.
enum CommandFixtures {
    static let root = (0..<5).reduce(URL(fileURLWithPath: #filePath)) { url, _ in
        url.deletingLastPathComponent()
    }
    /// The demo's base.
    static let tiny = root.appendingPathComponent("mlx_medphi/assets/tiny").path
    static let hasTiny = FileManager.default.fileExists(atPath: tiny)
    /// A bundle of the demo with an adapter "notes", where somebody made one.
    static let bundle = ProcessInfo.processInfo.environment["MEDPHI_DEMO_BUNDLE"]
    static let visit = Data("Doctor: Any fever?\nPatient: Since Monday, 38.5.\n".utf8)

    /// Makes a folder for one test, removed by the caller.
    static func folder() throws -> URL {
        let url = FileManager.default.temporaryDirectory.appendingPathComponent(
            "medphi-\(UUID().uuidString)")
        try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
        return url
    }
}

/// Texts in the order they came.
final class Lines: Sendable {
    private let state = Mutex<[String]>([])
    func add(_ text: String) { state.withLock { $0.append(text) } }
    var all: [String] { state.withLock { $0 } }
}
