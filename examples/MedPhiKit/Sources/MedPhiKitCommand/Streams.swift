import Foundation
import MedPhiKit

/// A stream of the process that the system does not let us write.
struct OutputFailure: Error {
    /// The system's number of the reason.
    let code: Int32

    /// Nobody reads on, as behind `| head -1`.
    var isClosedPipe: Bool { code == EPIPE }
    var reason: String { String(cString: strerror(code)) }
}

/// Standard input and output.
enum Streams {
    /// All bytes until the end. While nothing comes it looks whether the task was cancelled.
    ///
    /// - Throws: `CancellationError`, or `Phi3Error`: unreadable, or more than the limit.
    static func read(_ descriptor: Int32, limit: Int) throws -> Data {
        var data = Data()
        let room = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 16, alignment: 16)
        defer { room.deallocate() }
        while true {
            try Task.checkCancellation()
            guard wait(descriptor, POLLIN) else { continue }
            let count = systemRead(descriptor, room.baseAddress, room.count)
            if count == 0 { return data }
            if count < 0 {
                if errno == EINTR || errno == EAGAIN { continue }
                throw unreadable(String(cString: strerror(errno)))
            }
            data.append(contentsOf: UnsafeRawBufferPointer(rebasing: room[..<count]))
            try Reading.checkSize(data.count, "standard input", limit: limit)
        }
    }

    static func unreadable(_ reason: String) -> Phi3Error {
        .file(
            ErrorDetails(
                place: "-", found: "standard input cannot be read (\(reason))",
                expected: "text on standard input", advice: "Name a file instead."))
    }

    /// Writes all of a text.
    ///
    /// - Throws: `OutputFailure`.
    static func write(_ text: String, to descriptor: Int32) throws {
        var text = text
        try text.withUTF8 { bytes in
            var at = 0
            while at < bytes.count {
                let rest = UnsafeRawBufferPointer(rebasing: UnsafeRawBufferPointer(bytes)[at...])
                let count = systemWrite(descriptor, rest.baseAddress, rest.count)
                if count >= 0 {
                    at += count
                } else if errno == EAGAIN {
                    _ = wait(descriptor, POLLOUT)
                } else if errno != EINTR {
                    throw OutputFailure(code: errno)
                }
            }
        }
    }

    /// Waits a moment; whether the stream is ready, at its end or broken.
    private static func wait(_ descriptor: Int32, _ event: Int32) -> Bool {
        var waiting = pollfd(fd: descriptor, events: Int16(event), revents: 0)
        return poll(&waiting, 1, 50) > 0
    }
}

private func systemWrite(_ descriptor: Int32, _ bytes: UnsafeRawPointer?, _ count: Int) -> Int {
    write(descriptor, bytes, count)
}

private func systemRead(_ descriptor: Int32, _ room: UnsafeMutableRawPointer?, _ count: Int) -> Int
{
    read(descriptor, room, count)
}
