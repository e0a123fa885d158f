import Foundation
import MedPhiKit

/// Where the command reads and writes.
public struct Console: Sendable {
    let input: @Sendable () throws -> Data
    let output: @Sendable (String) -> Void
    let errors: @Sendable (String) -> Void

    /// A line, or several, of what was asked for.
    func print(_ text: String) { output(text + "\n") }
    /// A line about what goes on.
    func note(_ text: String) { errors(text + "\n") }
    /// The one line that says what went wrong.
    func fail(_ text: String) {
        let line = text.split(whereSeparator: \.isNewline)
            .map { $0.trimmingCharacters(in: .whitespaces) }.joined(separator: " ")
        errors("error: \(line)\n")
    }

    /// JSON, two spaces per level.
    func print(_ value: JSONValue) { print(value.text(.pretty)) }

    /// All bytes of standard input.
    public static let standardInput: @Sendable () throws -> Data = {
        try FileHandle.standardInput.readToEnd() ?? Data()
    }
    /// Standard output, not buffered: a note is read while it is written.
    public static let standardOutput: @Sendable (String) -> Void = { write($0, to: 1) }
    /// Standard error.
    public static let standardError: @Sendable (String) -> Void = { write($0, to: 2) }

    private static func write(_ text: String, to descriptor: Int32) {
        var text = text
        text.withUTF8 { bytes in
            var at = 0
            while at < bytes.count {
                let rest = UnsafeRawBufferPointer(rebasing: UnsafeRawBufferPointer(bytes)[at...])
                let count = systemWrite(descriptor, rest.baseAddress, rest.count)
                if count < 0, errno != EINTR { return }
                at += max(0, count)
            }
        }
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

    /// Rows of two columns.
    static func table(_ rows: [(String, String)]) -> String {
        let width = rows.map(\.0.count).max() ?? 0
        return rows.map {
            "\($0.0.padding(toLength: width, withPad: " ", startingAt: 0))  \($0.1)"
        }.joined(separator: "\n")
    }
}

private func systemWrite(_ descriptor: Int32, _ bytes: UnsafeRawPointer?, _ count: Int) -> Int {
    write(descriptor, bytes, count)
}
