import Foundation
import Synchronization

/// A file that is being fetched: its bytes are hashed as they come, and stay for the next attempt.
///
/// It is named by its SHA-256: `HASH.partial`, `HASH.tag` for the server's entity tag, and `HASH`
/// once it is whole and right.
final class PartialFile: Sendable {
    private struct State {
        var descriptor: Int32 = -1
        var hash = SHA256()
        var count = 0
        var head = Data()
        var lastByte = ContinuousClock.now
    }

    /// The first bytes that are kept to say what came instead of the file.
    private static let headBytes = 512

    let place: URL
    let expected: Int
    private let disk: StoreDisk
    private let state: Mutex<State>

    var partial: URL { PartialFile.partial(place) }
    static func partial(_ place: URL) -> URL { place.appendingPathExtension("partial") }
    static func tag(_ place: URL) -> URL { place.appendingPathExtension("tag") }

    /// Opens what is here already and hashes it; bytes beyond what the file can have are no part of it.
    init(_ place: URL, expected: Int, disk: StoreDisk) throws {
        (self.place, self.expected, self.disk) = (place, expected, disk)
        var state = State()
        let path = PartialFile.partial(place).path
        if FileBytes.kind(of: PartialFile.partial(place)) == .file {
            if FileBytes.size(of: PartialFile.partial(place)) > expected {
                unlink(path)
            } else {
                try FileBytes.pieces(of: PartialFile.partial(place)) { piece in
                    try Task.checkCancellation()
                    if state.head.count < PartialFile.headBytes {
                        state.head.append(
                            contentsOf: piece.prefix(PartialFile.headBytes - state.head.count))
                    }
                    state.hash.update(piece)
                    state.count += piece.count
                }
            }
        }
        // A link that somebody left there must not be written through.
        state.descriptor = open(path, O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0o644)
        guard state.descriptor >= 0, lseek(state.descriptor, off_t(state.count), SEEK_SET) >= 0
        else { throw Phi3Error.notWritten(path: path, reason: FileBytes.lastError()) }
        self.state = Mutex(state)
    }

    deinit { state.withLock { if $0.descriptor >= 0 { close($0.descriptor) } } }

    /// Bytes that are here.
    var count: Int { state.withLock { $0.count } }
    /// The first bytes.
    var head: Data { state.withLock { $0.head } }
    /// The hash of what is here.
    var digest: String { state.withLock { $0.hash.hexDigest() } }
    /// When a byte or an answer last came.
    var lastByte: ContinuousClock.Instant { state.withLock { $0.lastByte } }
    /// The time until now does not count as waiting.
    func touch() { state.withLock { $0.lastByte = .now } }

    /// The entity tag of the bytes that are here.
    var entityTag: String? {
        get {
            guard let data = try? FileBytes.read(PartialFile.tag(place), limit: 1024) else {
                return nil
            }
            return FileHead(status: 200, fields: ["etag": String(decoding: data, as: UTF8.self)])
                .entityTag
        }
        set {
            unlink(PartialFile.tag(place).path)
            if let newValue {
                try? Data(newValue.utf8).write(to: PartialFile.tag(place))
            }
        }
    }

    /// Throws away what is here.
    func restart() throws {
        try state.withLock { state in
            guard ftruncate(state.descriptor, 0) == 0, lseek(state.descriptor, 0, SEEK_SET) == 0
            else { throw Phi3Error.notWritten(path: partial.path, reason: FileBytes.lastError()) }
            state.hash = SHA256()
            state.count = 0
            state.head = Data()
        }
    }

    /// Appends bytes.
    ///
    /// - Throws: `TooLong` where there are more than the file has, `Phi3Error.notWritten`.
    func append(_ data: Data) throws {
        try state.withLock { state in
            state.lastByte = .now
            if state.head.count < PartialFile.headBytes {
                state.head.append(data.prefix(PartialFile.headBytes - state.head.count))
            }
            guard data.count <= expected - state.count else { throw TooLong() }
            try data.withUnsafeBytes { bytes in
                var at = 0
                while at < bytes.count {
                    let rest = UnsafeRawBufferPointer(rebasing: bytes[at...])
                    let count = disk.write(state.descriptor, rest)
                    if count < 0 {
                        if errno == EINTR { continue }
                        throw Phi3Error.notWritten(
                            path: partial.path, reason: FileBytes.lastError())
                    }
                    state.hash.update(UnsafeRawBufferPointer(rebasing: rest[..<count]))
                    state.count += count
                    at += count
                }
            }
        }
    }

    /// More bytes than the file has.
    struct TooLong: Error {}

    /// Forces the bytes to the disk and gives the file its name.
    func finish() throws {
        try state.withLock { state in
            let synced = fsync(state.descriptor) == 0
            let closed = close(state.descriptor) == 0
            state.descriptor = -1
            guard synced, closed, rename(partial.path, place.path) == 0 else {
                throw Phi3Error.notWritten(path: place.path, reason: FileBytes.lastError())
            }
        }
        unlink(PartialFile.tag(place).path)
    }
}

/// What a server sends where it has no such file for us.
enum Impostor {
    /// What the first bytes are, where they are not of a model.
    static func name(_ head: Data) -> String? {
        let text = String(decoding: head.prefix(256), as: UTF8.self)
        if text.hasPrefix("version https://git-lfs") {
            return "a Git LFS pointer, not the file it stands for"
        }
        let first = text.drop { $0.isWhitespace || $0 == "\u{FEFF}" }.prefix(14).lowercased()
        if first.hasPrefix("<!doctype html") || first.hasPrefix("<html") { return "an HTML page" }
        return nil
    }

    static func advice(_ name: String) -> String {
        name.hasPrefix("a Git")
            ? "Give the address that serves the files themselves (git lfs pull, or 'resolve' instead "
                + "of 'raw')."
            : "Give the address of the bundle's folder; open it in a browser to see what it is."
    }
}
