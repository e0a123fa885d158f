import Foundation

/// Giving a finished file or folder its name without taking another's.
enum Placing {
    /// Renames to a name that must be free.
    ///
    /// - Parameters:
    ///   - from: what was written.
    ///   - path: its name, in the same folder.
    ///   - isFolder: which of the two it is.
    ///   - first: the system's own way; where it knows none, an empty file or folder holds the name
    ///     until the rename.
    /// - Returns: 0, or an error number: `EEXIST` where something is there, however late it came.
    static func new(
        _ from: String, at path: String, isFolder: Bool,
        first: (String, String, Bool) -> Int32 = exclusively
    ) -> Int32 {
        let failure = first(from, path, isFolder)
        // Of these the second is what Linux says on disks without links.
        guard [ENOTSUP, EPERM, ENOSYS, EINVAL, EMLINK].contains(failure) else { return failure }
        if isFolder {
            guard mkdir(path, 0o777) == 0 else { return errno }
        } else {
            let descriptor = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0o666)
            guard descriptor >= 0 else { return errno }
            close(descriptor)
        }
        // A file in that folder, or the folder's removal, by others makes this fail.
        guard rename(from, path) != 0 else { return 0 }
        let reason = errno
        if isFolder { rmdir(path) } else { unlink(path) }
        return reason
    }

    /// The system's own way; `ENOTSUP` where there is none.
    private static let exclusively: @Sendable (String, String, Bool) -> Int32 = {
        from, path, isFolder in
        #if canImport(Darwin)
            return renamex_np(from, path, UInt32(RENAME_EXCL)) == 0 ? 0 : errno
        #else
            if isFolder { return ENOTSUP }
            guard systemLink(from, path) == 0 else { return errno }
            unlink(from)
            return 0
        #endif
    }

    /// Lets two folders change places at once; `false` where the system does not.
    static func exchange(_ one: String, _ other: String) -> Bool {
        #if canImport(Darwin)
            return renamex_np(one, other, UInt32(RENAME_SWAP)) == 0
        #else
            return false
        #endif
    }
}

/// What lies beside a file or folder while it is written: `.NAME.XXXXXXXX.part` and so on.
enum Sibling {
    enum Kind: String {
        /// A file being written.
        case part
        /// A folder being filled.
        case tmp
        /// A folder that another is about to replace.
        case old
    }

    /// No write takes longer.
    private static let mostAge = 86_400

    /// A name that is free.
    static func path(of url: URL, _ kind: Kind) -> String {
        let name = ".\(url.lastPathComponent).\(UUID().uuidString.prefix(8)).\(kind.rawValue)"
        return url.deletingLastPathComponent().appendingPathComponent(name).path
    }

    /// Removes what killed writes to the same name left, a day after they stopped.
    static func tidy(around url: URL, now: Int = time(nil)) {
        for found in all(of: url) {
            // An old folder without a new one is all there is.
            if found.kind == .old, !FileBytes.exists(url.path) { continue }
            guard let age = age(found.path, found.kind, now), age > mostAge else { continue }
            try? FileManager.default.removeItem(atPath: found.path)
        }
    }

    /// Puts a folder back that was renamed aside by a write which did not live to replace it.
    ///
    /// - Throws: `Phi3Error`: it cannot be renamed; the message names it.
    static func putBack(_ url: URL) throws {
        guard !FileBytes.exists(url.path) else { return }
        let asides = all(of: url).filter { $0.kind == .old }
        guard let latest = asides.min(by: { (age($0) ?? .max) < (age($1) ?? .max) }) else { return }
        let failure = Placing.new(latest.path, at: url.path, isFolder: true)
        // Another process may have done it, or have written anew.
        if failure == 0 || failure == EEXIST || failure == ENOENT { return }
        throw Phi3Error.file(
            ErrorDetails(
                place: url.path,
                found: "an interrupted write, and what was there before in \(latest.path)",
                expected: "that it can be renamed back "
                    + "(\(String(cString: strerror(failure))))",
                advice: "Rename it back, or remove it."))
    }

    private static func all(of url: URL) -> [(path: String, kind: Kind)] {
        let folder = url.deletingLastPathComponent()
        let start = ".\(url.lastPathComponent)."
        let names = (try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? []
        return names.compactMap { name in
            guard name.hasPrefix(start) else { return nil }
            let parts = name.dropFirst(start.count).split(
                separator: ".", omittingEmptySubsequences: false)
            guard parts.count == 2, let kind = Kind(rawValue: String(parts[1])),
                parts[0].utf8.count == 8,
                parts[0].utf8.allSatisfy({ Character(UnicodeScalar($0)).isHexDigit })
            else { return nil }
            return (folder.appendingPathComponent(name).path, kind)
        }
    }

    private static func age(_ found: (path: String, kind: Kind)) -> Int? {
        age(found.path, found.kind, time(nil))
    }

    /// Seconds since something was written to, or was renamed aside.
    private static func age(_ path: String, _ kind: Kind, _ now: Int) -> Int? {
        var info = stat()
        guard lstat(path, &info) == 0 else { return nil }
        #if canImport(Darwin)
            let (written, renamed) = (info.st_mtimespec.tv_sec, info.st_ctimespec.tv_sec)
        #else
            let (written, renamed) = (info.st_mtim.tv_sec, info.st_ctim.tv_sec)
        #endif
        return now - Int(kind == .old ? renamed : written)
    }
}

#if !canImport(Darwin)
    private func systemLink(_ from: String, _ to: String) -> Int32 { link(from, to) }
#endif
