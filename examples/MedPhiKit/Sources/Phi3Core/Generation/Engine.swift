import Foundation

/// One model in memory: loads it, writes one text after the other, and gives memory back.
///
/// Handles with different adapters share it. Generations, switches of the adapter that they need, and
/// unloading wait for each other in the order they were asked for.
actor Engine {
    nonisolated let backend: any TokenBackend
    nonisolated let tokenizer: Tokenizer
    nonisolated let loop: GenerationLoop
    nonisolated let board = StateBoard()
    private nonisolated let turns = AsyncMutex()
    private var isLoaded = false

    /// How many texts and other work wait for their turn.
    nonisolated var waitingCount: Int { turns.waitingCount }

    init(
        backend: any TokenBackend, tokenizer: Tokenizer, stopIDs: Set<Int32>,
        suppressed: [ClosedRange<Int32>]
    ) {
        self.backend = backend
        self.tokenizer = tokenizer
        loop = GenerationLoop(
            backend: backend, tokenizer: tokenizer, stopIDs: stopIDs, suppressed: suppressed)
    }

    /// Brings the model into memory; nothing where it is.
    func load(_ report: @escaping @Sendable (LoadEvent) -> Void = { _ in }) async throws {
        try await turns.withLock { try await ensureLoaded(report) }
    }

    /// Gives memory back, once the running generation has ended.
    func unload() async {
        await turns.withLockUncancelled {
            await backend.unload()
            isLoaded = false
            board.post(.unloaded)
        }
    }

    /// Reads two tokens and then one more, so that what is made at first use is made.
    func prewarm(_ adapter: BoundAdapter?) async throws {
        try await turns.withLock {
            try await ensureLoaded()
            let ids = [tokenizer.userID, tokenizer.endID, tokenizer.assistantID]
            try await guarded {
                for count in 2...3 {
                    _ = try await backend.logits(after: Array(ids.prefix(count)), adapter: adapter)
                }
            }
        }
    }

    /// The logits after some ids; see `TokenBackend.logits`.
    func logits(after ids: [Int32], adapter: BoundAdapter?) async throws -> [Float] {
        try await turns.withLock {
            try await ensureLoaded()
            return try await guarded { try await backend.logits(after: ids, adapter: adapter) }
        }
    }

    /// A place in the line, so that texts are written in the order they were asked for.
    nonisolated func ticket() -> AsyncMutex.Ticket { turns.ticket() }

    /// Writes a text when its turn comes; see `GenerationLoop.run`.
    func generate(
        _ prompt: [Int32], adapter: BoundAdapter?, options: GenerationOptions,
        ticket: AsyncMutex.Ticket, emit: (Delta) -> Void
    ) async throws -> Completion {
        try options.validate()
        try loop.checkPrompt(prompt)
        return try await turns.withLock(ticket) {
            try await ensureLoaded()
            board.post(.generating)
            return try await guarded {
                try await loop.run(prompt, adapter: adapter, options: options, emit: emit)
            }
        }
    }

    /// Writes the model to a place.
    func save(_ url: URL, adapter: BoundAdapter?, replace: Bool) async throws {
        try await turns.withLock {
            try await backend.save(url, adapter: adapter, replace: replace)
        }
    }

    private func ensureLoaded(
        _ report: @escaping @Sendable (LoadEvent) -> Void = { _ in }
    ) async throws {
        if isLoaded { return report(.ready) }
        let board = board
        try await guarded {
            try await backend.load { event in
                board.post(.loading(event))
                report(event)
            }
        }
        isLoaded = true
        report(.ready)
    }

    /// Runs a step and tells how it ended.
    private func guarded<Result>(_ step: () async throws -> Result) async throws -> Result {
        do {
            let result = try await step()
            board.post(.ready)
            return result
        } catch let error as CancellationError {
            board.post(isLoaded ? .ready : .unloaded)
            throw error
        } catch {
            let known = Phi3Error.wrapped(error)
            board.post(.failed(known))
            throw known
        }
    }
}

extension Phi3Error {
    /// An error of this package as it is, any other in its words.
    static func wrapped(_ error: any Error) -> Phi3Error {
        if let known = error as? Phi3Error { return known }
        return .generation(
            ErrorDetails(
                place: "the model", found: "\(error)", expected: "logits",
                advice: "Try again; if it stays, load the model again."))
    }
}
