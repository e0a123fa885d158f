/// A text while it is written: iterate over it for its pieces, or wait for its `result`.
///
/// It is written when its turn comes, asked for or not. The writing stops when a loop over it is left,
/// when the reader's task is cancelled, and when nobody holds it any more; what was written until then
/// is the result. In a cancelled task the loop ends without an error. Pieces wait for a slow reader and
/// never hold up the writing. It can be read once.
public struct Generation: AsyncSequence, Sendable {
    /// Gives the pieces.
    public struct AsyncIterator: AsyncIteratorProtocol {
        var reader: Writing<Delta, Completion>.Reader

        /// The next piece; `nil` at the end.
        ///
        /// - Throws: `Phi3Error`.
        public mutating func next() async throws -> Delta? { try await reader.next() }
    }

    private let writing: Writing<Delta, Completion>

    init(
        _ write:
            @escaping @Sendable (_ emit: @escaping @Sendable (Delta) -> Void) async throws ->
            Completion
    ) {
        writing = Writing(write)
    }

    /// Starts reading.
    public func makeAsyncIterator() -> AsyncIterator { AsyncIterator(reader: .init(writing)) }

    /// The finished text, also where it was cancelled.
    ///
    /// - Throws: `Phi3Error`; `CancellationError` where it was cancelled before its turn came.
    public var result: Completion {
        get async throws { try await writing.outcome }
    }

    /// Stops the writing after the token it is at.
    public func cancel() { writing.cancel() }
}
