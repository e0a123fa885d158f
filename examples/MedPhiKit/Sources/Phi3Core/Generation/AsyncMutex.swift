import Synchronization

/// Lets one caller in after the other, in the order they asked.
///
/// An actor alone does not: at each `await` inside it another call may begin.
final class AsyncMutex: Sendable {
    private struct Waiter {
        let number: UInt64
        let continuation: CheckedContinuation<Void, any Error>
    }

    private struct State {
        var isHeld = false
        var next: UInt64 = 0
        var waiting: [Waiter] = []
        // Cancelled before they stood in line.
        var cancelled: Set<UInt64> = []
    }

    private let state = Mutex(State())

    /// How many wait.
    var waitingCount: Int { state.withLock { $0.waiting.count } }

    /// Runs a body while nobody else does.
    ///
    /// - Throws: `CancellationError` where the task is cancelled while it waits; what the body throws.
    func withLock<Result>(
        isolation: isolated (any Actor)? = #isolation, _ body: () async throws -> Result
    ) async throws -> Result {
        try await enter()
        defer { leave() }
        return try await body()
    }

    /// Runs a body while nobody else does; waits also in a cancelled task.
    func withLockUncancelled(
        isolation: isolated (any Actor)? = #isolation, _ body: () async -> Void
    ) async {
        // Nobody knows this number, so nobody cancels it.
        let number = ticket()
        try? await wait(number)
        defer { leave() }
        await body()
    }

    private func enter(isolation: isolated (any Actor)? = #isolation) async throws {
        try Task.checkCancellation()
        let number = ticket()
        try await withTaskCancellationHandler {
            try await wait(number)
        } onCancel: {
            let waiter = state.withLock { state -> Waiter? in
                guard let place = state.waiting.firstIndex(where: { $0.number == number }) else {
                    state.cancelled.insert(number)
                    return nil
                }
                return state.waiting.remove(at: place)
            }
            waiter?.continuation.resume(throwing: CancellationError())
        }
        // Cancelled when it was in already: forget that, the body looks for itself.
        state.withLock { _ = $0.cancelled.remove(number) }
    }

    private func ticket() -> UInt64 {
        state.withLock {
            $0.next += 1
            return $0.next
        }
    }

    private func wait(
        _ number: UInt64, isolation: isolated (any Actor)? = #isolation
    ) async throws {
        try await withCheckedThrowingContinuation { continuation in
            let outcome: Result<Void, any Error>? = state.withLock { state in
                if state.cancelled.remove(number) != nil { return .failure(CancellationError()) }
                if state.isHeld {
                    state.waiting.append(Waiter(number: number, continuation: continuation))
                    return nil
                }
                state.isHeld = true
                return .success(())
            }
            if let outcome { continuation.resume(with: outcome) }
        }
    }

    private func leave() {
        let next = state.withLock { state -> Waiter? in
            if state.waiting.isEmpty {
                state.isHeld = false
                return nil
            }
            // The lock passes on without being open in between.
            return state.waiting.removeFirst()
        }
        next?.continuation.resume()
    }
}
