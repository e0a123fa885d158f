import Foundation

/// What is asked of a server: a file, or the rest of one.
public struct FileRequest: Sendable, Equatable {
    /// The file.
    public var url: URL
    /// The byte to begin with; 0 asks for all of it.
    public var start: Int
    /// The entity tag of the bytes that are here already: the server sends the rest only if it still
    /// has the same file.
    public var entityTag: String?

    /// Makes a request.
    public init(url: URL, start: Int = 0, entityTag: String? = nil) {
        self.url = url
        self.start = start
        self.entityTag = entityTag
    }

    /// The header fields that say it.
    public var fields: [String: String] {
        // Compressed bytes could be neither counted nor continued.
        var fields = ["Accept-Encoding": "identity"]
        if start > 0 {
            fields["Range"] = "bytes=\(start)-"
            fields["If-Range"] = entityTag
        }
        return fields
    }
}

/// The head of a server's answer.
public struct FileHead: Sendable, Equatable {
    /// The HTTP status.
    public var status: Int
    private var fields: [String: String]

    /// Makes a head; names of fields are the same in upper and lower case.
    public init(status: Int, fields: [String: String]) {
        self.status = status
        self.fields = Dictionary(
            fields.map { ($0.key.lowercased(), $0.value) }, uniquingKeysWith: { first, _ in first })
    }

    /// The entity tag, where it promises the very same bytes.
    public var entityTag: String? {
        guard let tag = fields["etag"], tag.hasPrefix("\""), tag.utf8.count <= 1024,
            tag.unicodeScalars.allSatisfy({ (0x20...0x7E).contains($0.value) })
        else { return nil }
        return tag
    }

    /// The first byte of a part, as the server says.
    public var start: Int? { rangeParts?.start }

    /// Bytes of the whole file; `nil`: not said.
    public var total: Int? {
        if status == 206 { return rangeParts?.total }
        return fields["content-length"].flatMap(FileHead.whole)
    }

    /// Seconds after which the server wants to be asked again.
    public var retryAfter: Int? { fields["retry-after"].flatMap(FileHead.whole) }

    /// The two numbers of `bytes 5-9/10`.
    private var rangeParts: (start: Int, total: Int?)? {
        guard let text = fields["content-range"], text.hasPrefix("bytes ") else { return nil }
        let parts = text.dropFirst(6).split(separator: "/")
        guard parts.count == 2, let first = parts[0].split(separator: "-").first,
            let start = FileHead.whole(String(first))
        else { return nil }
        return (start, FileHead.whole(String(parts[1])))
    }

    private static func whole(_ text: String) -> Int? {
        guard let value = Int(text), value >= 0 else { return nil }
        return value
    }
}

/// Why no answer came, or not all of it.
public struct TransportFailure: Error, Sendable, Equatable {
    /// In words, without the address.
    public var reason: String
    /// Whether asking again can help.
    public var isPassing: Bool

    /// Makes a failure.
    public init(_ reason: String, isPassing: Bool) {
        self.reason = reason
        self.isPassing = isPassing
    }
}

/// Fetches files for a `BundleStore`.
public protocol FileTransport: Sendable {
    /// Asks for one file and gives its bytes out as they come.
    ///
    /// It returns when all of them were given out, and soon after its task is cancelled. Redirects
    /// are followed by `FileAddress.follow`.
    ///
    /// - Parameters:
    ///   - request: what to ask for.
    ///   - head: is given the answer's head, once, before any byte; what it throws ends the fetch.
    ///   - body: is given the bytes in order; what it throws ends the fetch.
    /// - Throws: what `head` or `body` threw, `TransportFailure`, or `CancellationError`.
    func fetch(
        _ request: FileRequest, head: @escaping @Sendable (FileHead) throws -> Void,
        body: @escaping @Sendable (Data) throws -> Void
    ) async throws
}

/// Which addresses are asked at all.
public enum FileAddress {
    /// No server needs more redirects.
    public static let mostRedirects = 5

    /// Why an address is refused; `nil`: it is not. Only https is asked, and http on this machine.
    public static func problem(_ url: URL) -> String? {
        guard let host = url.host?.lowercased(), !host.isEmpty else { return "no address" }
        if url.user != nil || url.password != nil { return "an address with a password in it" }
        switch url.scheme?.lowercased() {
        case "https": return nil
        case "http":
            let own = ["localhost", "127.0.0.1", "::1", "[::1]"]
            return own.contains(host) ? nil : "an address without https"
        default: return "an address without https"
        }
    }

    /// Why a redirect is not followed; `nil`: it is.
    ///
    /// - Parameters:
    ///   - from: the address that was asked.
    ///   - target: the address it leads to.
    ///   - count: redirects followed so far.
    public static func follow(from: URL, to target: URL, count: Int) -> TransportFailure? {
        if count >= mostRedirects {
            return TransportFailure("more than \(mostRedirects) redirects", isPassing: false)
        }
        if let problem = problem(target) {
            return TransportFailure("a redirect to \(problem)", isPassing: false)
        }
        // A server far away must not make this machine ask itself.
        if from.scheme?.lowercased() == "https", target.scheme?.lowercased() != "https" {
            return TransportFailure("a redirect to an address without https", isPassing: false)
        }
        return nil
    }

    /// An address for messages: a query may hold a key, so it is left out.
    static func shown(_ url: URL) -> String {
        var parts = URLComponents(url: url, resolvingAgainstBaseURL: true)
        parts?.query = nil
        parts?.fragment = nil
        parts?.user = nil
        parts?.password = nil
        return printable(parts?.string ?? "the address", limit: 200)
    }

    /// The address of a bundle's file; a query of the bundle's own address is kept.
    static func file(_ path: String, of base: URL) -> URL? {
        guard var parts = URLComponents(url: base, resolvingAgainstBaseURL: true) else {
            return nil
        }
        parts.path += (parts.path.hasSuffix("/") ? "" : "/") + path
        parts.fragment = nil
        return parts.url
    }
}
