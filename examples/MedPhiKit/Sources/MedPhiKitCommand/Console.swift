import Foundation
import MedPhiKit
import Synchronization

/// Where the command reads and writes.
public struct Console: Sendable {
    let input: @Sendable () throws -> Data
    private let output: @Sendable (String) throws -> Void
    private let errors: @Sendable (String) -> Void
    private let lost = LostOutput()

    init(
        input: @escaping @Sendable () throws -> Data,
        output: @escaping @Sendable (String) throws -> Void,
        errors: @escaping @Sendable (String) -> Void
    ) {
        (self.input, self.output, self.errors) = (input, output, errors)
    }

    /// A piece of a note: its line breaks are its own, other control characters are left out.
    ///
    /// - Throws: what kept it from being written; then nothing more is written.
    func write(_ text: String) throws {
        send(Terminal.note(text))
        try requireWritten()
    }

    /// A line, or several, of what was asked for. What cannot be written is remembered.
    func print(_ text: String) { send(Terminal.text(text) + "\n") }

    /// JSON, two spaces per level.
    func print(_ value: JSONValue) { send(Terminal.json(value.text(.pretty)) + "\n") }

    /// A line about what goes on.
    func note(_ text: String) { errors(Terminal.line(text) + "\n") }

    /// The one line that says what went wrong.
    func fail(_ text: String) { errors("error: \(Terminal.line(text))\n") }

    /// Whether all of it reached standard output.
    ///
    /// - Throws: the first failure.
    func requireWritten() throws {
        if let failure = lost.failure { throw failure }
    }

    private func send(_ text: String) {
        guard lost.failure == nil else { return }
        do {
            try output(text)
        } catch {
            lost.keep(error)
        }
    }

    /// All bytes of standard input, up to the limit of a text.
    public static let standardInput: @Sendable () throws -> Data = {
        try Streams.read(0, limit: Reading.limit)
    }
    /// Standard output, not buffered: a note is read while it is written.
    public static let standardOutput: @Sendable (String) throws -> Void = {
        try Streams.write($0, to: 1)
    }
    /// Standard error. What cannot be written there can be told nobody.
    public static let standardError: @Sendable (String) -> Void = {
        try? Streams.write($0, to: 2)
    }

    /// Text of a message: no control characters, not too long.
    static func shown(_ text: String) -> String {
        let plain = text.unicodeScalars.prefix(60).map { scalar in
            scalar.value < 0x20 || scalar.value == 0x7F || (0x80..<0xA0).contains(scalar.value)
                ? "?" : String(scalar)
        }
        return plain.joined() + (text.unicodeScalars.count > 60 ? "…" : "")
    }

    /// Bytes as people read them.
    static func size(_ bytes: Int) -> String {
        let units = ["bytes", "kB", "MB", "GB", "TB"]
        var (value, unit) = (Double(bytes), 0)
        while value >= 1000, unit < units.count - 1 {
            value /= 1000
            unit += 1
        }
        return unit == 0 ? "\(bytes) bytes" : String(format: "%.1f %@", value, units[unit])
    }

    /// A measured number with its decimals; what is none is said in words.
    static func number(_ value: Double, decimals: Int, unit: String = "") -> String {
        guard value.isFinite else { return value.isNaN ? "not a number" : "infinite" }
        return String(format: "%.\(decimals)f", value) + unit
    }

    /// Rows of two columns, each on one line.
    static func table(_ rows: [(String, String)]) -> String {
        let width = rows.map(\.0.count).max() ?? 0
        return rows.map {
            "\($0.0.padding(toLength: width, withPad: " ", startingAt: 0))  \(Terminal.line($0.1))"
        }.joined(separator: "\n")
    }
}

/// The first piece of output that could not be written.
private final class LostOutput: Sendable {
    private let first = Mutex<(any Error)?>(nil)

    var failure: (any Error)? { first.withLock { $0 } }
    func keep(_ error: any Error) { first.withLock { $0 = $0 ?? error } }
}
