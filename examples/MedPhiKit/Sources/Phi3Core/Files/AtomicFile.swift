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
    /// the sibling is removed and what was there stays as it was.
    ///
    /// - Parameters:
    ///   - url: the file to write; through a link the place it leads to is written.
    ///   - replace: whether an existing file is replaced.
    ///   - body: writes the content.
    static func write(
        to url: URL, replace: Bool, _ body: (FileWriter) throws -> Void
    ) throws {
        let target = url.resolvingSymlinksInPath()
        try checkFree(target, replace)
        let temporary = sibling(of: target, "part")
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
            try checkFree(target, replace)
            guard rename(temporary, target.path) == 0 else {
                throw Phi3Error.notWritten(path: url.path, reason: FileBytes.lastError())
            }
            syncFolder(target.deletingLastPathComponent().path)
        } catch {
            if isOpen { close(descriptor) }
            unlink(temporary)
            throw error
        }
    }

    /// Makes a temporary sibling folder, has it filled, and renames it to its place. An old folder is
    /// renamed aside first and comes back where anything fails.
    ///
    /// - Parameters:
    ///   - url: the folder to make.
    ///   - replace: whether an existing one is replaced.
    ///   - body: fills the temporary folder that it is given.
    static func folder(at url: URL, replace: Bool, _ body: (URL) throws -> Void) throws {
        let target = url.resolvingSymlinksInPath()
        try checkFree(target, replace)
        let temporary = sibling(of: target, "tmp")
        guard mkdir(temporary, 0o777) == 0 else {
            throw Phi3Error.notWritten(path: url.path, reason: FileBytes.lastError())
        }
        do {
            try body(URL(fileURLWithPath: temporary, isDirectory: true))
            syncFolder(temporary)
            try checkFree(target, replace)
            try swap(temporary, target.path, url)
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

    private static func swap(_ new: String, _ path: String, _ url: URL) throws {
        guard FileBytes.exists(path) else {
            guard rename(new, path) == 0 else {
                throw Phi3Error.notWritten(path: url.path, reason: FileBytes.lastError())
            }
            return
        }
        let aside = sibling(of: URL(fileURLWithPath: path), "old")
        guard rename(path, aside) == 0 else {
            throw Phi3Error.notWritten(path: url.path, reason: FileBytes.lastError())
        }
        guard rename(new, path) == 0 else {
            let reason = FileBytes.lastError()
            _ = rename(aside, path)
            throw Phi3Error.notWritten(path: url.path, reason: reason)
        }
        try? FileManager.default.removeItem(atPath: aside)
    }

    private static func sibling(of url: URL, _ suffix: String) -> String {
        let name = ".\(url.lastPathComponent).\(UUID().uuidString.prefix(8)).\(suffix)"
        return url.deletingLastPathComponent().appendingPathComponent(name).path
    }

    private static func checkFree(_ url: URL, _ replace: Bool) throws {
        if !replace, FileBytes.exists(url.path) {
            throw Phi3Error.notWritten(
                path: url.path,
                reason: "exists already; choose another name or replace it on purpose")
        }
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
