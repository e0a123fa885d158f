/// A text while it is written: iterate over it for its pieces, or wait for its `result`.
///
/// It is being written from the moment it is made. When its reader's task is cancelled, or nobody
/// holds it any more, the writing stops; what was written until then is the result. Pieces wait for a
/// slow reader and never hold up the writing. One reader only.
public struct Generation: AsyncSequence, Sendable {
    /// Gives the pieces.
    public struct AsyncIterator: AsyncIteratorProtocol {
        var base: AsyncThrowingStream<Delta, any Error>.Iterator

        /// The next piece; `nil` at the end.
        ///
        /// - Throws: `Phi3Error`.
        public mutating func next() async throws -> Delta? { try await base.next() }
    }

    private let stream: AsyncThrowingStream<Delta, any Error>
    private let task: Task<Completion, any Error>

    init(
        _ write: @escaping @Sendable (_ emit: @escaping @Sendable (Delta) -> Void) async throws ->
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
        AsyncIterator(base: stream.makeAsyncIterator())
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
