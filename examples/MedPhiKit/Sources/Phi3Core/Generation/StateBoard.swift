import Synchronization

/// What the model is doing, told to everybody who asked.
final class StateBoard: Sendable {
    private struct Content {
        var state = ModelState.unloaded
        var next = 0
        var readers: [Int: AsyncStream<ModelState>.Continuation] = [:]
    }

    private let content = Mutex(Content())

    /// What it is doing now.
    var state: ModelState { content.withLock { $0.state } }

    /// Tells everybody.
    func post(_ state: ModelState) {
        content.withLock { content in
            if content.state == state { return }
            content.state = state
            for reader in content.readers.values { reader.yield(state) }
        }
    }

    /// What it is doing now and from now on.
    func states() -> AsyncStream<ModelState> {
        let (stream, continuation) = AsyncStream.makeStream(of: ModelState.self)
        let number = content.withLock { content in
            content.next += 1
            content.readers[content.next] = continuation
            continuation.yield(content.state)
            return content.next
        }
        continuation.onTermination = { [weak self] _ in
            self?.content.withLock { _ = $0.readers.removeValue(forKey: number) }
        }
        return stream
    }

    deinit {
        for reader in content.withLock({ Array($0.readers.values) }) { reader.finish() }
    }
}
