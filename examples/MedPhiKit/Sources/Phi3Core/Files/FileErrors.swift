import Foundation

/// Several things wrong with one file or folder, found before anything of it is used.
public struct ProblemList: Sendable, Equatable, CustomStringConvertible {
    /// The file or folder.
    public var path: String
    /// What the problems mean together, e.g. "does not fit this model".
    public var what: String
    /// One line for each problem, sorted, none twice.
    public var problems: [String]
    /// What to do.
    public var advice: String

    /// Collects problems; the lines are sorted and made unique.
    public init(path: String, what: String, problems: [String], advice: String) {
        self.path = path
        self.what = what
        self.problems = Set(problems).sorted()
        self.advice = advice
    }

    /// The message: a first line that says what it is about, then at most ten problems.
    public var description: String {
        var lines = ["\(path): \(what) (\(counted(problems.count, "problem"))):"]
        lines += problems.prefix(10).map { "  \($0)" }
        let more = problems.count > 10 ? "… and \(problems.count - 10) more. " : ""
        lines.append("  \(more)\(advice)")
        return lines.joined(separator: "\n")
    }

    /// The same in the four parts of other messages.
    var details: ErrorDetails {
        ErrorDetails(
            place: path,
            found: "\(what) (\(counted(problems.count, "problem"))): \(capped(problems))",
            expected: "none", advice: advice)
    }
}

extension Phi3Error {
    /// A file or folder that the system does not let us read.
    static func unreadable(path: String, reason: String) -> Phi3Error {
        .file(
            ErrorDetails(
                place: path, found: "cannot be read (\(reason))", expected: "a readable file",
                advice: "Check that it is there and may be read."))
    }

    /// A file or folder that could not be written; what was there before is unchanged.
    static func notWritten(path: String, reason: String) -> Phi3Error {
        if [ENOTDIR, EEXIST].contains(where: { reason == String(cString: strerror($0)) }),
            let file = FileBytes.fileOnTheWay(to: path)
        {
            return .file(
                ErrorDetails(
                    place: path,
                    found: "cannot be written (\(file == path ? "it" : file) is a file)",
                    expected: "a folder", advice: "Name a folder, or another place."))
        }
        return .file(
            ErrorDetails(
                place: path, found: "cannot be written (\(reason))",
                expected: "a place with room for it",
                advice: "What was there is unchanged; make room or choose another place."))
    }

    /// A file that is not what its kind promises.
    static func damaged(
        path: String, what: String, expected: String = "a whole file",
        advice: String = "Fetch or write the file again."
    ) -> Phi3Error {
        .damagedFile(
            ErrorDetails(place: path, found: what, expected: expected, advice: advice))
    }

    /// A checkpoint that is no Phi-3, is incomplete, or does not fit its `config.json`.
    static func checkpoint(
        _ path: String, _ found: String, expected: String, advice: String
    ) -> Phi3Error {
        .checkpoint(
            ErrorDetails(place: path, found: found, expected: expected, advice: advice))
    }
}

extension FileBytes {
    /// The first part of a path that is no folder but a file or a device.
    static func fileOnTheWay(to path: String) -> String? {
        var url = URL(fileURLWithPath: path).standardizedFileURL
        var found: String?
        while url.path != "/", !url.path.isEmpty {
            switch kind(of: url) {
            case .file, .other: found = url.path
            case .folder: return found
            case .missing: break
            }
            url = url.deletingLastPathComponent()
        }
        return found
    }
}

/// Joins sorted items with commas; after `limit` of them says how many more there are.
func capped(_ items: some Sequence<String>, limit: Int = 10) -> String {
    let names = items.sorted()
    let shown = names.prefix(limit).joined(separator: ", ")
    return names.count <= limit ? shown : "\(shown) … and \(names.count - limit) more"
}

/// A count with its noun: "1 file", "2 files".
func counted(_ count: Int, _ noun: String) -> String {
    "\(count) \(noun)\(count == 1 ? "" : "s")"
}
