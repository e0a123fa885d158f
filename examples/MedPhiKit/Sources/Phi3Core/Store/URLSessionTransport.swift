import Foundation
import Synchronization

#if canImport(FoundationNetworking)
    import FoundationNetworking
#endif

/// Fetches files with Foundation's `URLSession`. Nothing is cached and no cookie is kept.
public final class URLSessionTransport: FileTransport {
    private let session: URLSession
    private let router: Router

    /// Makes a transport with a session of its own.
    public init() {
        let configuration = URLSessionConfiguration.ephemeral
        configuration.urlCache = nil
        configuration.httpShouldSetCookies = false
        configuration.requestCachePolicy = .reloadIgnoringLocalCacheData
        // How long nothing may come is the store's own matter.
        configuration.timeoutIntervalForRequest = 24 * 60 * 60
        let queue = OperationQueue()
        queue.maxConcurrentOperationCount = 1
        router = Router()
        session = URLSession(configuration: configuration, delegate: router, delegateQueue: queue)
    }

    deinit { session.finishTasksAndInvalidate() }

    /// See `FileTransport`.
    public func fetch(
        _ request: FileRequest, head: @escaping @Sendable (FileHead) throws -> Void,
        body: @escaping @Sendable (Data) throws -> Void
    ) async throws {
        var question = URLRequest(url: request.url)
        for (name, value) in request.fields { question.setValue(value, forHTTPHeaderField: name) }
        let task = session.dataTask(with: question)
        defer { withExtendedLifetime(self) {} }
        try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { done in
                router.add(Fetch(head: head, body: body, done: done), task.taskIdentifier)
                task.resume()
            }
        } onCancel: {
            task.cancel()
        }
    }
}

/// One fetch: who is told, and what has gone wrong so far.
private struct Fetch: Sendable {
    let head: @Sendable (FileHead) throws -> Void
    let body: @Sendable (Data) throws -> Void
    let done: CheckedContinuation<Void, any Error>
    var redirects = 0
    var failure: (any Error)?
}

/// Hands what a session reports to the fetch it belongs to. A session calls it on one queue.
///
/// Its methods are optional on Apple's systems: one whose types are not exactly Foundation's is never
/// called.
final class Router: NSObject, URLSessionDataDelegate, Sendable {
    private let fetches = Mutex<[Int: Fetch]>([:])

    fileprivate func add(_ fetch: Fetch, _ id: Int) { fetches.withLock { $0[id] = fetch } }

    private func get(_ id: Int) -> Fetch? { fetches.withLock { $0[id] } }

    private func fail(_ task: URLSessionTask, _ error: any Error) {
        fetches.withLock { $0[task.taskIdentifier]?.failure = error }
        task.cancel()
    }

    func urlSession(
        _ session: URLSession, task: URLSessionTask,
        willPerformHTTPRedirection response: HTTPURLResponse, newRequest request: URLRequest,
        completionHandler: @escaping @Sendable (URLRequest?) -> Void
    ) {
        let count = fetches.withLock { fetches in
            defer { fetches[task.taskIdentifier]?.redirects += 1 }
            return fetches[task.taskIdentifier]?.redirects ?? 0
        }
        let refused: TransportFailure? =
            if let from = response.url, let target = request.url {
                FileAddress.follow(from: from, to: target, count: count)
            } else {
                TransportFailure("a redirect to no address", isPassing: false)
            }
        if let refused {
            // Foundation on Linux does not survive a cancel in here; the answer that follows ends it.
            fetches.withLock { $0[task.taskIdentifier]?.failure = refused }
            return completionHandler(nil)
        }
        completionHandler(request)
    }

    func urlSession(
        _ session: URLSession, dataTask: URLSessionDataTask, didReceive response: URLResponse,
        completionHandler: @escaping @Sendable (URLSession.ResponseDisposition) -> Void
    ) {
        if get(dataTask.taskIdentifier)?.failure != nil { return completionHandler(.cancel) }
        guard let answer = response as? HTTPURLResponse else {
            fail(dataTask, TransportFailure("no HTTP answer", isPassing: false))
            return completionHandler(.cancel)
        }
        var fields: [String: String] = [:]
        for (name, value) in answer.allHeaderFields {
            if let name = name as? String, let value = value as? String { fields[name] = value }
        }
        do {
            try get(dataTask.taskIdentifier)?.head(
                FileHead(status: answer.statusCode, fields: fields))
            completionHandler(.allow)
        } catch {
            fail(dataTask, error)
            completionHandler(.cancel)
        }
    }

    func urlSession(_ session: URLSession, dataTask: URLSessionDataTask, didReceive data: Data) {
        guard let fetch = get(dataTask.taskIdentifier), fetch.failure == nil else { return }
        do {
            try fetch.body(data)
        } catch {
            fail(dataTask, error)
        }
    }

    func urlSession(
        _ session: URLSession, task: URLSessionTask, didCompleteWithError error: (any Error)?
    ) {
        guard let fetch = fetches.withLock({ $0.removeValue(forKey: task.taskIdentifier) }) else {
            return
        }
        if let failure = fetch.failure {
            fetch.done.resume(throwing: failure)
        } else if let error {
            fetch.done.resume(throwing: Router.failure(error))
        } else {
            fetch.done.resume()
        }
    }

    private static func failure(_ error: any Error) -> any Error {
        let code = (error as? URLError)?.code ?? URLError.Code(rawValue: (error as NSError).code)
        switch code {
        case .cancelled: return CancellationError()
        case .badURL, .unsupportedURL, .secureConnectionFailed, .serverCertificateUntrusted,
            .serverCertificateHasBadDate, .serverCertificateHasUnknownRoot,
            .serverCertificateNotYetValid, .clientCertificateRejected, .httpTooManyRedirects,
            .appTransportSecurityRequiresSecureConnection:
            return TransportFailure(words(error), isPassing: false)
        default: return TransportFailure(words(error), isPassing: true)
        }
    }

    /// The system's words, without the address, which the message has already.
    private static func words(_ error: any Error) -> String {
        let text = printable(error.localizedDescription, limit: 120)
        return text.contains("://") ? "network error \((error as NSError).code)" : text
    }
}
