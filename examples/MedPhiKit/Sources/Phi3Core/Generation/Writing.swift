/// Something that is written by a task of its own, with what is given out on the way.
///
/// The one mechanism behind `Generation` and `NoteStream`; see there for when the writing stops.
struct Writing<Piece: Sendable, Outcome: Sendable>: Sendable {
    /// Gives the pieces; when it goes, because the loop was left, what was being written stops.
    struct Reader {
        private var base: AsyncThrowingStream<Piece, any Error>.Iterator
        private let end: End

        init(_ writing: Writing) {
            let task = writing.task
            base = writing.stream.makeAsyncIterator()
            end = End { task.cancel() }
        }

        mutating func next() async throws -> Piece? { try await base.next() }
    }

    private final class End: Sendable {
        private let stop: @Sendable () -> Void

        init(_ stop: @escaping @Sendable () -> Void) { self.stop = stop }

        deinit { stop() }
    }

    private let stream: AsyncThrowingStream<Piece, any Error>
    private let task: Task<Outcome, any Error>

    init(
        _ write:
            @escaping @Sendable (_ emit: @escaping @Sendable (Piece) -> Void) async throws ->
            Outcome
    ) {
        let (stream, continuation) = AsyncThrowingStream.makeStream(of: Piece.self)
        let task = Task {
            do {
                let outcome = try await write { continuation.yield($0) }
                continuation.finish()
                return outcome
            } catch {
                continuation.finish(throwing: error)
                throw error
            }
        }
        continuation.onTermination = { if case .cancelled = $0 { task.cancel() } }
        self.stream = stream
        self.task = task
    }

    /// What came of it; a caller that is cancelled stops the writing.
    var outcome: Outcome {
        get async throws {
            try await withTaskCancellationHandler {
                try await task.value
            } onCancel: {
                task.cancel()
            }
        }
    }

    func cancel() { task.cancel() }
}
