import Synchronization

/// Lets one caller in after the other, in the order they took their tickets.
///
/// An actor alone does not: at each `await` inside it another call may begin.
final class AsyncMutex: Sendable {
    /// A place in the line. One that is given up, or that nobody holds any more, holds up nobody.
    final class Ticket: Sendable {
        fileprivate let number: UInt64
        private let line: AsyncMutex

        fileprivate init(_ number: UInt64, _ line: AsyncMutex) {
            self.number = number
            self.line = line
        }

        deinit { giveUp() }

        /// Leaves the line, or the room.
        func giveUp() { line.giveUp(number) }
    }

    private struct State {
        var next: UInt64 = 0
        // By rising number. Who is inside is the first of them.
        var line: [UInt64] = []
        var isHeld = false
        var waiting: [UInt64: CheckedContinuation<Void, any Error>] = [:]
        // Cancelled before they waited.
        var cancelled: Set<UInt64> = []

        /// Lets the first in, if the room is free and it stands at the door.
        mutating func admit() -> CheckedContinuation<Void, any Error>? {
            guard !isHeld, let first = line.first,
                let continuation = waiting.removeValue(forKey: first)
            else { return nil }
            isHeld = true
            return continuation
        }
    }

    private let state = Mutex(State())

    /// How many wait at the door.
    var waitingCount: Int { state.withLock { $0.waiting.count } }

    /// A place at the end of the line.
    func ticket() -> Ticket {
        let number = state.withLock { state in
            state.next += 1
            state.line.append(state.next)
            return state.next
        }
        return Ticket(number, self)
    }

    /// Runs a body while nobody else does.
    ///
    /// - Parameter ticket: a place taken before; `nil`: the end of the line.
    /// - Throws: `CancellationError` where the task is cancelled while it waits; what the body throws.
    func withLock<Result>(
        _ ticket: Ticket? = nil, isolation: isolated (any Actor)? = #isolation,
        _ body: () async throws -> Result
    ) async throws -> Result {
        let ticket = ticket ?? self.ticket()
        defer { ticket.giveUp() }
        try await enter(ticket.number)
        return try await body()
    }

    /// Runs a body while nobody else does; waits also in a cancelled task.
    func withLockUncancelled(
        isolation: isolated (any Actor)? = #isolation, _ body: () async -> Void
    ) async {
        let ticket = ticket()
        defer { ticket.giveUp() }
        // Nobody knows this number, so nobody cancels it.
        try? await wait(ticket.number)
        await body()
    }

    private func enter(
        _ number: UInt64, isolation: isolated (any Actor)? = #isolation
    ) async throws {
        try Task.checkCancellation()
        try await withTaskCancellationHandler {
            try await wait(number)
        } onCancel: {
            let continuation = state.withLock { state in
                let continuation = state.waiting.removeValue(forKey: number)
                if continuation == nil { state.cancelled.insert(number) }
                return continuation
            }
            continuation?.resume(throwing: CancellationError())
        }
    }

    private func wait(
        _ number: UInt64, isolation: isolated (any Actor)? = #isolation
    ) async throws {
        try await withCheckedThrowingContinuation { continuation in
            let outcome: Result<Void, any Error>? = state.withLock { state in
                if state.cancelled.contains(number) { return .failure(CancellationError()) }
                if !state.isHeld, state.line.first == number {
                    state.isHeld = true
                    return .success(())
                }
                state.waiting[number] = continuation
                return nil
            }
            if let outcome { continuation.resume(with: outcome) }
        }
    }

    private func giveUp(_ number: UInt64) {
        let next = state.withLock { state -> CheckedContinuation<Void, any Error>? in
            state.cancelled.remove(number)
            guard let place = state.line.firstIndex(of: number) else { return nil }
            state.line.remove(at: place)
            if place == 0 { state.isHeld = false }
            return state.admit()
        }
        next?.resume()
    }
}
