import Foundation

/// A file being written beside its final place; see `AtomicFile.write`.
struct FileWriter {
    fileprivate let descriptor: Int32
    fileprivate let path: String

    /// Appends bytes.
    ///
    /// - Throws: `Phi3Error.notWritten`, e.g. where the disk is full.
    func write(_ bytes: UnsafeRawBufferPointer) throws {
        var at = 0
        while at < bytes.count {
            let rest = UnsafeRawBufferPointer(rebasing: bytes[at...])
            let count = systemWrite(descriptor, rest.baseAddress, rest.count)
            if count < 0 {
                if errno == EINTR { continue }
                throw Phi3Error.notWritten(path: path, reason: FileBytes.lastError())
            }
            at += count
        }
    }

    /// Appends bytes.
    func write(_ data: Data) throws {
        try data.withUnsafeBytes { try write($0) }
    }
}

/// Files that appear complete or not at all.
enum AtomicFile {
    /// Writes a temporary sibling, forces it to the disk and renames it to its place. On any error
    /// the sibling is removed and what was there stays as it was. What killed writes to the same name
    /// left beside it is removed after a day.
    ///
    /// - Parameters:
    ///   - url: the file to write; through a link the place it leads to is written.
    ///   - replace: whether an existing file is replaced; otherwise not even one that appears while
    ///     this one is written.
    ///   - body: writes the content.
    static func write(
        to url: URL, replace: Bool, _ body: (FileWriter) throws -> Void
    ) throws {
        let target = url.resolvingSymlinksInPath()
        try checkFree(target, replace)
        Sibling.tidy(around: target)
        let temporary = Sibling.path(of: target, .part)
        let descriptor = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0o666)
        guard descriptor >= 0 else {
            throw Phi3Error.notWritten(path: url.path, reason: FileBytes.lastError())
        }
        var isOpen = true
        do {
            try body(FileWriter(descriptor: descriptor, path: url.path))
            let synced = fsync(descriptor) == 0
            isOpen = false
            guard close(descriptor) == 0, synced else {
                throw Phi3Error.notWritten(path: url.path, reason: FileBytes.lastError())
            }
            try put(temporary, at: target.path, replace, isFolder: false)
            syncFolder(target.deletingLastPathComponent().path)
        } catch {
            if isOpen { close(descriptor) }
            unlink(temporary)
            throw error
        }
    }

    /// Makes a temporary sibling folder, has it filled, and renames it to its place. An old folder is
    /// renamed aside first and comes back where anything fails, at the next write to its name where
    /// the machine stopped in between.
    ///
    /// - Parameters:
    ///   - url: the folder to make.
    ///   - replace: whether an existing one is replaced.
    ///   - body: fills the temporary folder that it is given.
    static func folder(at url: URL, replace: Bool, _ body: (URL) throws -> Void) throws {
        let target = url.resolvingSymlinksInPath()
        try Sibling.putBack(target)
        try checkFree(target, replace)
        Sibling.tidy(around: target)
        let temporary = Sibling.path(of: target, .tmp)
        guard mkdir(temporary, 0o777) == 0 else {
            throw Phi3Error.notWritten(path: url.path, reason: FileBytes.lastError())
        }
        do {
            try body(URL(fileURLWithPath: temporary, isDirectory: true))
            syncFolder(temporary)
            if replace, FileBytes.exists(target.path) {
                try swap(temporary, target)
            } else {
                try put(temporary, at: target.path, replace, isFolder: true)
            }
            syncFolder(target.deletingLastPathComponent().path)
        } catch {
            try? FileManager.default.removeItem(atPath: temporary)
            throw error
        }
    }

    /// Copies a file byte for byte into a folder that is being made.
    static func copy(_ source: URL, to target: URL) throws {
        try write(to: target, replace: false) { writer in
            try FileBytes.pieces(of: source) { try writer.write($0) }
        }
    }

    /// Gives a finished file or folder its name.
    private static func put(
        _ temporary: String, at path: String, _ replace: Bool, isFolder: Bool
    ) throws {
        let failure =
            replace
            ? (rename(temporary, path) == 0 ? 0 : errno)
            : Placing.new(temporary, at: path, isFolder: isFolder)
        if failure == EEXIST, !replace { throw taken(path) }
        if failure != 0 {
            throw Phi3Error.notWritten(path: path, reason: String(cString: strerror(failure)))
        }
    }

    private static func swap(_ new: String, _ target: URL) throws {
        let path = target.path
        if Placing.exchange(new, path) {
            try? FileManager.default.removeItem(atPath: new)
            return
        }
        let aside = Sibling.path(of: target, .old)
        guard rename(path, aside) == 0 else {
            throw Phi3Error.notWritten(path: path, reason: FileBytes.lastError())
        }
        guard rename(new, path) == 0 else {
            let reason = FileBytes.lastError()
            if rename(aside, path) == 0 {
                throw Phi3Error.notWritten(path: path, reason: reason)
            }
            throw Phi3Error.file(
                ErrorDetails(
                    place: path, found: "cannot be written (\(reason))",
                    expected: "a place with room for it",
                    advice: "What was there is now at \(aside): rename it back, or take what is in "
                        + "its place."))
        }
        try? FileManager.default.removeItem(atPath: aside)
    }

    private static func taken(_ path: String) -> Phi3Error {
        .notWritten(
            path: path, reason: "exists already; choose another name or replace it on purpose")
    }

    private static func checkFree(_ url: URL, _ replace: Bool) throws {
        if !replace, FileBytes.exists(url.path) { throw taken(url.path) }
    }

    private static func syncFolder(_ path: String) {
        let descriptor = open(path, O_RDONLY | O_CLOEXEC)
        guard descriptor >= 0 else { return }
        fsync(descriptor)
        close(descriptor)
    }
}

/// A folder that is being made and appears complete or not at all.
public struct FolderWriter {
    /// Where it is while it is being made.
    public let url: URL

    /// Makes a folder beside its place, has it filled, and renames it.
    ///
    /// - Parameters:
    ///   - url: the folder.
    ///   - replace: whether an existing one is replaced.
    ///   - body: fills it.
    /// - Throws: `Phi3Error`; what was there is unchanged.
    public static func write(
        to url: URL, replace: Bool = false, _ body: (FolderWriter) throws -> Void
    ) throws {
        try AtomicFile.folder(at: url, replace: replace) { try body(FolderWriter(url: $0)) }
    }

    /// Writes a small file of it.
    public func write(_ data: Data, name: String) throws {
        try AtomicFile.write(to: url.appendingPathComponent(name), replace: false) {
            try $0.write(data)
        }
    }

    /// Copies plain files of another folder byte for byte.
    public func copy(_ names: [String], from folder: URL) throws {
        for name in names where FileBytes.kind(of: folder.appendingPathComponent(name)) == .file {
            try AtomicFile.copy(
                folder.appendingPathComponent(name), to: url.appendingPathComponent(name))
        }
    }
}

private func systemWrite(_ descriptor: Int32, _ bytes: UnsafeRawPointer?, _ count: Int) -> Int {
    write(descriptor, bytes, count)
}
