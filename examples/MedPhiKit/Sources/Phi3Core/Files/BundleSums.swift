import Foundation

/// `SHA256SUMS`: every file of a bundle and its hash. Links and devices have no place in a bundle:
/// what is hashed must be what is loaded.
enum BundleSums {
    static let fileName = "SHA256SUMS"
    private static let mostBytes = 16 << 20
    // Finder leaves this in every folder it shows.
    private static let nobodys = ".DS_Store"

    /// Every file but `SHA256SUMS`: path in the bundle -> place on this machine.
    ///
    /// - Throws: `Phi3Error`: a link, a device, a name that cannot be listed, an unreadable folder.
    static func files(in bundle: URL) throws -> [String: URL] {
        var found: [String: URL] = [:]
        var refused: [String] = []
        try walk(bundle, "", &found, &refused)
        if !refused.isEmpty {
            throw Phi3Error.checksumMismatch(
                ProblemList(
                    path: bundle.path, what: "holds what is no plain file",
                    problems: refused.map { "\($0) is a link, a device or no name for a file" },
                    advice: "Copy the bundle anew, following links."))
        }
        return found
    }

    private static func walk(
        _ folder: URL, _ prefix: String, _ found: inout [String: URL], _ refused: inout [String]
    ) throws {
        let names: [String]
        do {
            names = try FileManager.default.contentsOfDirectory(atPath: folder.path)
        } catch {
            throw Phi3Error.unreadable(path: folder.path, reason: FileBytes.reason(of: error))
        }
        for name in names {
            let path = prefix + name
            let place = folder.appendingPathComponent(name)
            if ManifestChecks.pathProblem(path) != nil || FileBytes.isLink(place.path) {
                refused.append(printable(path))
                continue
            }
            switch FileBytes.kind(of: place) {
            case .folder: try walk(place, path + "/", &found, &refused)
            case .file:
                if path != fileName, name != nobodys, found.updateValue(place, forKey: path) != nil
                {
                    refused.append(printable(path))
                }
            default: refused.append(printable(path))
            }
        }
    }

    /// Path -> SHA-256, as the file lists them.
    ///
    /// - Throws: `Phi3Error`: missing or damaged.
    static func read(in bundle: URL) throws -> [String: String] {
        let url = bundle.appendingPathComponent(fileName)
        let data = try FileBytes.read(url, limit: mostBytes)
        guard let text = String(validating: data, as: UTF8.self) else {
            throw Phi3Error.damaged(
                path: url.path, what: "not UTF-8", advice: "Fetch or export the bundle again.")
        }
        var lines = text.utf8.split(separator: 0x0A, omittingEmptySubsequences: false)
        var sums: [String: String] = [:]
        let last = lines.popLast()
        for (number, line) in lines.enumerated() {
            let hash = String(line.prefix(64)) ?? ""
            let path = String(line.dropFirst(66)) ?? ""
            guard isSHA256(hash), line.dropFirst(64).starts(with: "  ".utf8),
                ManifestChecks.pathProblem(path) == nil, sums.updateValue(hash, forKey: path) == nil
            else {
                throw Phi3Error.damaged(
                    path: url.path,
                    what: "line \(number + 1) is damaged, or names a file outside the "
                        + "bundle or twice", expected: "hash, two spaces, path",
                    advice: "Fetch or export the bundle again.")
            }
        }
        guard last?.isEmpty == true else {
            throw Phi3Error.damaged(
                path: url.path, what: "cut short", advice: "Fetch or export the bundle again.")
        }
        return sums
    }

    /// Files that are not as `sums` says: altered, missing or not listed, one line for each.
    ///
    /// - Parameters:
    ///   - bundle: its folder.
    ///   - sums: path -> SHA-256.
    ///   - only: read just this one; `nil`: all.
    ///   - progress: called with the bytes read so far and in all; may throw to stop.
    static func differing(
        in bundle: URL, _ sums: [String: String], only: String? = nil,
        progress: ((_ done: Int, _ total: Int) throws -> Void)? = nil
    ) throws -> [String] {
        let files = try files(in: bundle)
        var lines = sums.keys.filter { files[$0] == nil }.map { "\($0) is missing" }
        lines += files.keys.filter { sums[$0] == nil }.map { "\(printable($0)) is not listed" }
        let wanted = files.filter { sums[$0.key] != nil && (only == nil || only == $0.key) }
        let total = wanted.values.reduce(0) { $0 + FileBytes.size(of: $1) }
        var done = 0
        for (path, place) in wanted.sorted(by: { $0.key < $1.key }) {
            let hash = try SHA256.hex(contentsOf: place) { count in
                done += count
                try progress?(done, total)
            }
            if hash != sums[path] { lines.append("\(path) is altered") }
        }
        return lines.sorted()
    }
}
