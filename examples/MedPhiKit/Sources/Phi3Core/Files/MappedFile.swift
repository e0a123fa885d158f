import Foundation

/// A file mapped into memory: its bytes are read when they are touched, and not before.
public struct MappedFile: Sendable {
    /// Where it lies.
    public let url: URL
    /// All bytes.
    public let data: Data

    /// Maps a plain file.
    ///
    /// - Throws: `Phi3Error.unreadable` for what is missing, no plain file, or may not be read.
    public init(_ url: URL) throws {
        self.url = url
        guard FileBytes.kind(of: url) == .file else {
            throw Phi3Error.unreadable(path: url.path, reason: FileBytes.kind(of: url).reason)
        }
        do {
            data = try Data(contentsOf: url, options: .mappedIfSafe)
        } catch {
            throw Phi3Error.unreadable(path: url.path, reason: FileBytes.reason(of: error))
        }
        try FileBytes.refusePointer(data, of: url)
    }

    /// Some bytes of the file, still mapped.
    ///
    /// - Parameter range: a range of offsets inside the file.
    /// - Throws: `Phi3Error.damaged` where the range leaves the file.
    public func bytes(_ range: Range<Int>) throws -> Data {
        guard range.lowerBound >= 0, range.upperBound <= data.count else {
            throw Phi3Error.damaged(
                path: url.path, what: "it has \(data.count) bytes, asked for \(range)",
                advice: "Fetch or write the file again.")
        }
        return data[data.startIndex + range.lowerBound..<data.startIndex + range.upperBound]
    }
}

/// Reading files, and what is at a path.
public enum FileBytes {
    /// What a path leads to, links followed.
    public enum Kind: Sendable, Equatable {
        /// A plain file.
        case file
        /// A folder.
        case folder
        /// A device, a socket or a pipe.
        case other
        /// Nothing.
        case missing

        var reason: String {
            switch self {
            case .file: return "a file"
            case .folder: return "a folder, expected a file"
            case .other: return "no plain file"
            case .missing: return "no such file"
            }
        }
    }

    /// What is at a path, links followed.
    public static func kind(of url: URL) -> Kind {
        var info = stat()
        guard stat(url.path, &info) == 0 else { return .missing }
        return kind(mode: mode_t(info.st_mode))
    }

    /// Whether the path itself is a link, wherever it leads.
    static func isLink(_ path: String) -> Bool {
        var info = stat()
        return lstat(path, &info) == 0 && mode_t(info.st_mode) & S_IFMT == S_IFLNK
    }

    /// Whether anything is at a path, a link that leads nowhere included.
    static func exists(_ path: String) -> Bool {
        var info = stat()
        return lstat(path, &info) == 0
    }

    private static func kind(mode: mode_t) -> Kind {
        switch mode & S_IFMT {
        case S_IFREG: return .file
        case S_IFDIR: return .folder
        default: return .other
        }
    }

    /// The size of a file in bytes; 0 where there is none.
    public static func size(of url: URL) -> Int {
        var info = stat()
        return stat(url.path, &info) == 0 ? Int(info.st_size) : 0
    }

    /// The bytes of a small file.
    ///
    /// - Parameters:
    ///   - url: the file.
    ///   - limit: the size from which it is refused.
    /// - Throws: `Phi3Error`: unreadable, or larger than the limit.
    public static func read(_ url: URL, limit: Int) throws -> Data {
        let size = size(of: url)
        if size > limit {
            throw Phi3Error.damaged(
                path: url.path,
                what: "it has \(size) bytes, over the \(limit) that such a file needs",
                advice: "Fetch or write the file again.")
        }
        var data = Data(capacity: size)
        try pieces(of: url) { data.append(contentsOf: $0) }
        try refusePointer(data, of: url)
        return data
    }

    /// Refuses a file in whose place Git LFS left the few lines that stand for it.
    ///
    /// - Parameter url: a file; what is missing or no file is let pass.
    /// - Throws: `Phi3Error.damagedFile`.
    public static func refusePointer(_ url: URL) throws {
        // Git LFS reads no pointer of 1024 bytes or more.
        guard kind(of: url) == .file, size(of: url) < 1024 else { return }
        _ = try read(url, limit: 1024)
    }

    static func refusePointer(_ data: Data, of url: URL) throws(Phi3Error) {
        guard data.count < 1024, data.starts(with: Data("version https://git-lfs".utf8)) else {
            return
        }
        throw Phi3Error.damaged(
            path: url.path, what: "a Git LFS pointer, not the file itself",
            expected: "the file it stands for", advice: "Run git lfs pull in its folder.")
    }

    /// A JSON file.
    ///
    /// - Throws: `Phi3Error`: unreadable, larger than the limit, or no JSON in UTF-8.
    public static func json(_ url: URL, limit: Int = jsonLimit) throws -> JSONValue {
        try json(try read(url, limit: limit), of: url)
    }

    /// No JSON file of a model but its tokenizer is larger.
    public static let jsonLimit = 16 << 20

    /// The JSON that a file's bytes hold.
    static func json(_ data: Data, of url: URL) throws -> JSONValue {
        do {
            return try JSONValue(parsing: data)
        } catch {
            throw Phi3Error.damaged(
                path: url.path, what: "not valid JSON in UTF-8 (\(error))",
                advice: "Fetch or write the file again.")
        }
    }

    /// Reads a plain file in pieces of 4 MiB.
    static func pieces(of url: URL, _ body: (UnsafeRawBufferPointer) throws -> Void) throws {
        guard kind(of: url) == .file else {
            throw Phi3Error.unreadable(path: url.path, reason: kind(of: url).reason)
        }
        let descriptor = open(url.path, O_RDONLY | O_CLOEXEC)
        guard descriptor >= 0 else {
            throw Phi3Error.unreadable(path: url.path, reason: lastError())
        }
        defer { close(descriptor) }
        let room = UnsafeMutableRawBufferPointer.allocate(byteCount: 4 << 20, alignment: 16)
        defer { room.deallocate() }
        while true {
            let count = systemRead(descriptor, room.baseAddress, room.count)
            if count < 0 {
                if errno == EINTR { continue }
                throw Phi3Error.unreadable(path: url.path, reason: lastError())
            }
            if count == 0 { return }
            try body(UnsafeRawBufferPointer(rebasing: room[..<count]))
        }
    }

    /// The last system error in words.
    static func lastError() -> String { String(cString: strerror(errno)) }

    /// A Foundation error in words, without the path that the message has already.
    static func reason(of error: any Error) -> String {
        if let code = systemCode(of: error) { return String(cString: strerror(code)) }
        let error = error as NSError
        if error.domain == NSCocoaErrorDomain {
            switch CocoaError.Code(rawValue: error.code) {
            case .fileNoSuchFile, .fileReadNoSuchFile: return "no such file"
            case .fileReadNoPermission, .fileWriteNoPermission: return "no permission"
            case .fileWriteFileExists: return "something is there already"
            case .fileWriteOutOfSpace: return "no space left"
            case .fileWriteVolumeReadOnly: return "the volume may only be read"
            case .fileReadInvalidFileName, .fileWriteInvalidFileName: return "no name for a file"
            case .fileReadTooLarge: return "too large"
            case .fileReadUnknown: return "the system could not read it and says no reason"
            case .fileWriteUnknown: return "the system could not write it and says no reason"
            default: break
            }
        }
        return "the system's error \(error.code) of \(error.domain)"
    }

    /// The number of the system call's failure that a Foundation error wraps, at any depth.
    private static func systemCode(of error: any Error, depth: Int = 0) -> Int32? {
        let error = error as NSError
        if error.domain == NSPOSIXErrorDomain { return Int32(truncatingIfNeeded: error.code) }
        // Outside Apple's systems it is no NSError here, and casts to one only as an Error.
        guard depth < 8, let inner = error.userInfo[NSUnderlyingErrorKey] as? any Error else {
            return nil
        }
        return systemCode(of: inner, depth: depth + 1)
    }
}

private func systemRead(_ descriptor: Int32, _ room: UnsafeMutableRawPointer?, _ count: Int) -> Int
{
    read(descriptor, room, count)
}
