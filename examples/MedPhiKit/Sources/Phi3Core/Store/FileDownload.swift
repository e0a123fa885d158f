import Foundation
import Synchronization

/// Fetches single files: retries by the kind of error, a watchdog, and the hash at the end.
struct FileDownload: Sendable {
    let transport: any FileTransport
    let options: StoreOptions
    let report: @Sendable (InstallEvent) -> Void

    /// Why an attempt failed and whether another one is worth it.
    private struct Setback: Error {
        var reason: String
        var retryAfter: Int?
        /// What is here is of no use.
        var restarts = false
    }

    /// A small file, into memory.
    func small(_ url: URL, name: String, limit: Int) async throws -> Data {
        let data = try await attempts(url, name: name) {
            let body = Mutex(Data())
            let clock = Mutex(ContinuousClock.now)
            try await watched({ clock.withLock { $0 } }) {
                try await transport.fetch(FileRequest(url: url)) { head in
                    clock.withLock { $0 = .now }
                    if let setback = try refusal(head, url) { throw setback }
                } body: { piece in
                    clock.withLock { $0 = .now }
                    try body.withLock { body in
                        guard body.count + piece.count <= limit else {
                            throw failure(
                                url, "more than \(limit) bytes", "a \(name)",
                                "Give the address of the bundle's folder.")
                        }
                        body.append(piece)
                    }
                }
            }
            return body.withLock { $0 }
        }
        if let what = Impostor.name(data) {
            throw failure(url, what, "a \(name)", Impostor.advice(what))
        }
        return data
    }

    /// A large file: what is here already is kept, the rest is asked for.
    ///
    /// - Parameters:
    ///   - url: the file.
    ///   - path: its path in the bundle, for events.
    ///   - sha256: what it must hash to.
    ///   - file: where its bytes go.
    ///   - received: called with the bytes that are here.
    func large(
        _ url: URL, path: String, sha256: String, into file: PartialFile,
        received: @escaping @Sendable (Int) -> Void
    ) async throws {
        try await attempts(url, name: path, file) {
            let begun = file.count
            file.touch()
            if file.count < file.expected || file.expected == 0 {
                try await watched({ file.lastByte }) {
                    try await fetch(url, into: file, received: received)
                }
            }
            try check(file, url, sha256, wasFresh: begun == 0)
        }
        try file.finish()
    }

    private func fetch(
        _ url: URL, into file: PartialFile, received: @escaping @Sendable (Int) -> Void
    ) async throws {
        let start = file.count
        let tag = file.entityTag
        let total = Mutex<Int?>(nil)
        do {
            try await transport.fetch(FileRequest(url: url, start: start, entityTag: tag)) { head in
                file.touch()
                if let setback = try refusal(head, url) { throw setback }
                if head.status == 206 {
                    let same = tag == nil || head.entityTag == nil || head.entityTag == tag
                    guard start > 0, head.start == start, same else {
                        throw Setback(reason: "another part than asked for", restarts: true)
                    }
                } else if start > 0 {
                    try file.restart()
                }
                if file.count == 0 || tag == nil { file.entityTag = head.entityTag }
                total.withLock { $0 = head.total }
            } body: { piece in
                try file.append(piece)
                received(file.count)
            }
        } catch is PartialFile.TooLong {
            throw wrong(file, url, "more bytes than the \(file.expected) it has")
        }
        if file.count < file.expected {
            // A whole answer that is too short is another file; any other was cut off.
            if total.withLock({ $0 }) == file.count {
                throw wrong(file, url, "\(file.count) bytes instead of \(file.expected)")
            }
            throw Setback(reason: "the connection ended early")
        }
    }

    private func check(
        _ file: PartialFile, _ url: URL, _ sha256: String, wasFresh: Bool
    ) throws {
        guard file.digest != sha256 else { return }
        // The bytes from before may be the wrong ones.
        if !wasFresh { throw Setback(reason: "the bytes do not fit together", restarts: true) }
        throw wrong(file, url, "bytes with another SHA-256 than the list of hashes says")
    }

    /// The error for bytes that are not the file; they are of no use to another attempt.
    private func wrong(_ file: PartialFile, _ url: URL, _ found: String) -> Phi3Error {
        let what = Impostor.name(file.head)
        unlink(file.partial.path)
        unlink(PartialFile.tag(file.place).path)
        return failure(
            url, what ?? found, "the file that SHA256SUMS lists",
            what.map(Impostor.advice)
                ?? "Nothing of it was installed. Ask whoever serves the bundle.")
    }

    /// Runs attempts until one succeeds. Those that brought bytes do not count.
    private func attempts<Value: Sendable>(
        _ url: URL, name: String, _ file: PartialFile? = nil, _ body: () async throws -> Value
    ) async throws -> Value {
        var idle = 0
        // A server that gives one byte each time would keep us forever.
        for round in 1... {
            try Task.checkCancellation()
            let before = file?.count ?? 0
            do {
                return try await body()
            } catch let failed as TransportFailure where !failed.isPassing {
                throw failure(
                    url, failed.reason, "the file", "Check the address and the connection.")
            } catch let setback as Setback {
                try Task.checkCancellation()
                let grew = (file?.count ?? 0) > before
                if setback.restarts { try file?.restart() }
                idle = grew && !setback.restarts ? 1 : idle + 1
                if idle >= options.attempts || round >= options.attempts * 20 {
                    throw failure(
                        url, "\(setback.reason), \(counted(round, "time"))", "the file",
                        "What came so far is kept: install again to go on.")
                }
                let delay = options.delay(attempt: idle, asked: setback.retryAfter)
                report(.waiting(path: name, seconds: delay.seconds, reason: setback.reason))
                try await Task.sleep(for: delay)
            }
        }
        throw CancellationError()
    }

    /// Runs a fetch and ends it when nothing comes for too long.
    private func watched(
        _ lastByte: @escaping @Sendable () -> ContinuousClock.Instant,
        _ fetch: @escaping @Sendable () async throws -> Void
    ) async throws {
        let limit = options.stall
        do {
            try await withThrowingTaskGroup(of: Void.self) { group in
                group.addTask { try await fetch() }
                group.addTask {
                    while true {
                        let idle = ContinuousClock.now - lastByte()
                        if idle >= limit {
                            throw Setback(reason: "nothing came for \(limit)")
                        }
                        try await Task.sleep(for: limit - idle)
                    }
                }
                defer { group.cancelAll() }
                try await group.next()
            }
        } catch let failed as TransportFailure where failed.isPassing {
            try Task.checkCancellation()
            throw Setback(reason: failed.reason)
        }
    }

    /// What a status means: nothing for the file itself, a setback where waiting may help.
    private func refusal(_ head: FileHead, _ url: URL) throws -> Setback? {
        switch head.status {
        case 200, 206: return nil
        case 416: return Setback(reason: "the server has no such part", restarts: true)
        case 408, 425, 429, 500, 502, 503, 504:
            return Setback(
                reason: "the server answered \(head.status)", retryAfter: head.retryAfter)
        case 401, 403:
            throw failure(
                url, "the server answered \(head.status)", "a file that anyone may fetch",
                "Check the address, and whether it needs a key.")
        default:
            throw failure(
                url, "the server answered \(head.status)", "the file",
                "Check the address: it must be the bundle's folder.")
        }
    }

    private func failure(
        _ url: URL, _ found: String, _ expected: String, _ advice: String
    ) -> Phi3Error {
        .download(
            ErrorDetails(
                place: FileAddress.shown(url), found: found, expected: expected, advice: advice))
    }
}
