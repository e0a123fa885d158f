import Foundation

extension FileBytes {
    /// Where a path leads, links followed; of what does not exist yet, the folders around it.
    public static func realPath(of url: URL) -> String {
        var existing = url.absoluteURL.standardizedFileURL
        var missing: [String] = []
        while !exists(existing.path), existing.path != "/", !existing.lastPathComponent.isEmpty {
            missing.insert(existing.lastPathComponent, at: 0)
            existing.deleteLastPathComponent()
        }
        let real = existing.resolvingSymlinksInPath().standardizedFileURL
        return missing.reduce(real) { $0.appendingPathComponent($1) }.path
    }

    /// Whether one of two places is in the other, or both are the same.
    public static func overlap(_ one: URL, _ other: URL) -> Bool {
        let (left, right) = (realPath(of: one), realPath(of: other))
        return left == right || left.hasPrefix(right + "/") || right.hasPrefix(left + "/")
    }
}
