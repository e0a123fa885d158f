/// A text while it is written: iterate over it for its pieces, or wait for its `result`.
///
/// It is written when its turn comes, asked for or not. The writing stops when a loop over it is left,
/// when the reader's task is cancelled, and when nobody holds it any more; what was written until then
/// is the result. In a cancelled task the loop ends without an error. Pieces wait for a slow reader and
/// never hold up the writing. It can be read once.
public struct Generation: AsyncSequence, Sendable {
    /// Gives the pieces.
    public struct AsyncIterator: AsyncIteratorProtocol {
        var base: AsyncThrowingStream<Delta, any Error>.Iterator
        let reading: Reading

        /// The next piece; `nil` at the end.
        ///
        /// - Throws: `Phi3Error`.
        public mutating func next() async throws -> Delta? { try await base.next() }
    }

    private let stream: AsyncThrowingStream<Delta, any Error>
    private let task: Task<Completion, any Error>

    init(
        _ write:
            @escaping @Sendable (_ emit: @escaping @Sendable (Delta) -> Void) async throws ->
            Completion
    ) {
        let (stream, continuation) = AsyncThrowingStream.makeStream(of: Delta.self)
        let task = Task {
            do {
                let completion = try await write { continuation.yield($0) }
                continuation.finish()
                return completion
            } catch {
                continuation.finish(throwing: error)
                throw error
            }
        }
        continuation.onTermination = { if case .cancelled = $0 { task.cancel() } }
        self.stream = stream
        self.task = task
    }

    /// Starts reading.
    public func makeAsyncIterator() -> AsyncIterator {
        let task = task
        return AsyncIterator(
            base: stream.makeAsyncIterator(), reading: Reading { task.cancel() })
    }

    /// The finished text, also where it was cancelled.
    ///
    /// - Throws: `Phi3Error`; `CancellationError` where it was cancelled before its turn came.
    public var result: Completion {
        get async throws {
            try await withTaskCancellationHandler {
                try await task.value
            } onCancel: {
                task.cancel()
            }
        }
    }

    /// Stops the writing after the token it is at.
    public func cancel() { task.cancel() }
}

/// Somebody who reads: when the loop is left, this goes, and what was being written stops.
final class Reading: Sendable {
    private let stop: @Sendable () -> Void

    init(_ stop: @escaping @Sendable () -> Void) { self.stop = stop }

    deinit { stop() }
}
