import Synchronization

/// Keeps a line from being printed many times in a row.
final class LastLine: Sendable {
    private let line = Mutex("")

    func isNew(_ text: String) -> Bool {
        line.withLock { line in
            defer { line = text }
            return line != text
        }
    }
}
