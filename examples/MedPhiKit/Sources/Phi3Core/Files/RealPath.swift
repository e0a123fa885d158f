import Foundation

extension FileBytes {
    /// Which file or folder a path leads to, whatever it is called: two spellings of one name are one
    /// place on a disk that takes them for the same.
    struct Identity: Hashable {
        let device: UInt64
        let number: UInt64
    }

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
        overlap(one, other, identity: identity(of:))
    }

    /// The same, for a disk that says which paths are one place.
    static func overlap(
        _ one: URL, _ other: URL, identity: (_ path: String) -> Identity?
    ) -> Bool {
        func holds(_ outer: String, _ inner: String) -> Bool {
            if outer == inner || inner.hasPrefix(outer + "/") { return true }
            guard let wanted = identity(outer) else { return false }
            return folders(to: inner).contains { identity($0) == wanted }
        }
        let (left, right) = (realPath(of: one), realPath(of: other))
        return holds(left, right) || holds(right, left)
    }

    /// What is at a path, links followed; `nil`: nothing.
    static func identity(of path: String) -> Identity? {
        var info = stat()
        guard stat(path, &info) == 0 else { return nil }
        return Identity(
            device: UInt64(truncatingIfNeeded: info.st_dev),
            number: UInt64(truncatingIfNeeded: info.st_ino))
    }

    /// A path and all folders around it.
    private static func folders(to path: String) -> [String] {
        var place = URL(fileURLWithPath: path)
        var paths = [place.path]
        while place.path != "/", !place.lastPathComponent.isEmpty {
            place.deleteLastPathComponent()
            paths.append(place.path)
        }
        return paths
    }
}
