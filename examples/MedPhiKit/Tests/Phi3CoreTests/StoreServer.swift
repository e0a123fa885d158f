import Foundation
import Synchronization

@testable import Phi3Core

/// A small HTTP/1.1 server on this machine, with the faults of large ones.
final class StoreServer: Sendable {
    /// What it does with one request instead of answering it.
    enum Fault: Sendable {
        /// Closes the connection after so many bytes of the body.
        case drop(Int)
        /// Sends nothing more after so many bytes, and keeps the connection.
        case stall(Int)
        /// Answers with a status and these header fields.
        case status(Int, [String: String] = [:])
        /// Sends other bytes, under the file's own headers.
        case bytes(Data)
        /// Sends the whole of another file.
        case file(Data)
        /// Sends so many bytes, and the rest when a test says so.
        case held(Int, Gate)
    }

    /// Closed until a test opens it.
    final class Gate: Sendable {
        private let semaphore = DispatchSemaphore(value: 0)
        func open() { semaphore.signal() }
        fileprivate func wait() { semaphore.wait() }
    }

    /// One request as it came, and how much of the body it is sent.
    struct Request: Sendable, Equatable {
        var path: String
        var start: Int?
        var ifRange: String?
        var sent = 0
    }

    private struct State {
        var files: [String: Data] = [:]
        var faults: [String: [Fault]] = [:]
        var requests: [Request] = []
        var tagSuffix = ""
        var isOpen = true
    }

    private let state = Mutex(State())
    private let listener: Int32
    let port: UInt16

    init() throws {
        #if os(Linux)
            let kind = Int32(SOCK_STREAM.rawValue)
        #else
            let kind = SOCK_STREAM
        #endif
        listener = socket(AF_INET, kind, 0)
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_addr.s_addr = UInt32(0x7F00_0001).bigEndian
        var length = socklen_t(MemoryLayout<sockaddr_in>.size)
        let bound = withUnsafeMutablePointer(to: &address) { [listener] pointer in
            pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { place in
                bind(listener, place, length) == 0 && listen(listener, 16) == 0
                    && getsockname(listener, place, &length) == 0
            }
        }
        guard bound else { throw POSIXError(.EADDRNOTAVAIL) }
        port = UInt16(bigEndian: address.sin_port)
        let listener = listener
        Thread.detachNewThread { [weak self] in
            while true {
                let connection = accept(listener, nil, nil)
                guard connection >= 0 else { return }
                guard let self else {
                    close(connection)
                    return
                }
                Thread.detachNewThread { self.serve(connection) }
            }
        }
    }

    deinit { stop() }

    func stop() {
        let wasOpen = state.withLock { state in
            defer { state.isOpen = false }
            return state.isOpen
        }
        if wasOpen {
            shutdown(listener, Int32(SHUT_RDWR))
            close(listener)
        }
    }

    func url(_ path: String) -> URL { URL(string: "http://127.0.0.1:\(port)/\(path)")! }

    /// Serves the files of a folder under a name; a new call replaces what was there.
    func serve(_ folder: TestFolder, as name: String) throws {
        var files: [String: Data] = [:]
        for (path, place) in try BundleSums.files(in: folder.url) {
            files["/\(name)/\(path)"] = try Data(contentsOf: place)
        }
        files["/\(name)/SHA256SUMS"] = try Data(contentsOf: folder["SHA256SUMS"])
        state.withLock { $0.files = files }
    }

    func set(_ data: Data, at path: String) { state.withLock { $0.files["/\(path)"] = data } }
    func changeTags(_ suffix: String) { state.withLock { $0.tagSuffix = suffix } }

    /// The next requests for a path meet these faults, one each.
    func fail(_ path: String, _ faults: Fault...) {
        state.withLock { $0.faults["/\(path)", default: []] += faults }
    }

    /// The requests so far; they are forgotten.
    func takeRequests() -> [Request] {
        state.withLock { state in
            defer { state.requests = [] }
            return state.requests
        }
    }

    private func serve(_ connection: Int32) {
        defer { close(connection) }
        #if canImport(Darwin)
            var on: Int32 = 1
            setsockopt(
                connection, SOL_SOCKET, SO_NOSIGPIPE, &on, socklen_t(MemoryLayout<Int32>.size))
        #endif
        guard let head = readHead(connection) else { return }
        let lines = head.components(separatedBy: "\r\n")
        let words = lines[0].split(separator: " ")
        guard words.count == 3 else { return }
        var request = Request(path: String(words[1]))
        for line in lines.dropFirst() {
            let parts = line.split(separator: ":", maxSplits: 1).map {
                $0.trimmingCharacters(in: .whitespaces)
            }
            guard parts.count == 2 else { continue }
            if parts[0].lowercased() == "range" {
                request.start = Int(parts[1].dropFirst(6).dropLast())
            }
            if parts[0].lowercased() == "if-range" { request.ifRange = parts[1] }
        }
        answer(request, connection)
    }

    private func readHead(_ connection: Int32) -> String? {
        var bytes: [UInt8] = []
        var room = [UInt8](repeating: 0, count: 4096)
        while !bytes.suffix(4).elementsEqual([13, 10, 13, 10]) {
            let count = recv(connection, &room, room.count, 0)
            guard count > 0, bytes.count < 65536 else { return nil }
            bytes += room[..<count]
        }
        return String(decoding: bytes, as: UTF8.self)
    }

    private func answer(_ asked: Request, _ connection: Int32) {
        let (file, fault, suffix) = state.withLock { state in
            let queue = state.faults[asked.path] ?? []
            state.faults[asked.path] = Array(queue.dropFirst())
            return (state.files[asked.path], queue.first, state.tagSuffix)
        }
        // Written down before an answer goes out: who reads the list has had its answer.
        func note(_ sent: Int) {
            var request = asked
            request.sent = sent
            state.withLock { $0.requests.append(request) }
        }
        if case .status(let status, let fields) = fault {
            note(0)
            let lines = fields.map { "\($0.key): \($0.value)\r\n" }.joined()
            send(
                connection,
                "HTTP/1.1 \(status) No\r\nContent-Length: 0\r\n\(lines)Connection: close\r\n\r\n")
            return
        }
        guard var data = file else {
            note(0)
            send(connection, "HTTP/1.1 404 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        }
        if case .file(let other) = fault { data = other }
        let tag = "\"\(SHA256.hex(data).prefix(16))\(suffix)\""
        var start = 0
        if let from = asked.start, asked.ifRange == nil || asked.ifRange == tag {
            guard from < data.count else {
                note(0)
                send(
                    connection, "HTTP/1.1 416 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            }
            start = from
        }
        switch fault {
        case .drop(let count), .stall(let count): note(min(count, data.count - start))
        default: note(data.count - start)
        }
        let range = "Content-Range: bytes \(start)-\(data.count - 1)/\(data.count)\r\n"
        send(
            connection,
            "HTTP/1.1 \(start > 0 ? "206 Part" : "200 OK")\r\nETag: \(tag)\r\nContent-Length: "
                + "\(data.count - start)\r\n\(start > 0 ? range : "")Connection: close\r\n\r\n")
        if case .bytes(let other) = fault { data = other }
        body(data.dropFirst(start), fault, connection)
    }

    /// Sends the body as far as a fault lets it.
    private func body(_ data: Data, _ fault: Fault?, _ connection: Int32) {
        switch fault {
        case .drop(let count): send(connection, data.prefix(count))
        case .stall(let count):
            send(connection, data.prefix(count))
            // Until the other side has enough of it.
            var byte: UInt8 = 0
            _ = recv(connection, &byte, 1, 0)
        case .held(let count, let gate):
            send(connection, data.prefix(count))
            gate.wait()
            send(connection, data.dropFirst(count))
        default: send(connection, data)
        }
    }

    private func send(_ connection: Int32, _ text: String) { send(connection, Data(text.utf8)) }

    @discardableResult private func send(_ connection: Int32, _ data: Data) -> Bool {
        #if os(Linux)
            let flags = Int32(MSG_NOSIGNAL)
        #else
            let flags: Int32 = 0
        #endif
        return data.withUnsafeBytes { bytes in
            var at = 0
            while at < bytes.count {
                let count = systemSend(connection, bytes.baseAddress! + at, bytes.count - at, flags)
                if count <= 0 { return false }
                at += count
            }
            return true
        }
    }
}

private func systemSend(_ to: Int32, _ bytes: UnsafeRawPointer, _ count: Int, _ flags: Int32) -> Int
{
    send(to, bytes, count, flags)
}
