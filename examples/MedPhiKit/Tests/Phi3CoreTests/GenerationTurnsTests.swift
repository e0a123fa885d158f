import Foundation
import Synchronization
import Testing

@testable import Phi3Core

private final class Order: Sendable {
    let numbers = Mutex<[Int]>([])
}

@Suite(.timeLimit(.minutes(5))) struct GenerationTurnsTests {
    let prompt: [Int32] = [5, 6, 7]

    @Test func textsOfOneModelAreWrittenOneAfterTheOther() async throws {
        let (model, backend) = try Scripts.saying(
            "first things first", prompt: prompt, pause: .milliseconds(1))
        let texts = try await withThrowingTaskGroup(of: String.self) { group in
            for _ in 0..<4 {
                group.addTask { try await model.respond(to: .ids(prompt)).text }
            }
            return try await group.reduce(into: []) { $0.append($1) }
        }
        #expect(texts == Array(repeating: "first things first", count: 4))
        let record = backend.record.withLock { ($0.overlaps, $0.calls, $0.loads) }
        #expect(record.0 == 0)
        #expect(record.2 == 1)
        // Whole texts, not tokens in turn: lengths rise from the prompt's anew for each text.
        let starts = record.1.filter { $0.ids == prompt }.count
        #expect(starts == 4)
        for (before, after) in zip(record.1, record.1.dropFirst()) {
            #expect(after.ids.count == before.ids.count + 1 || after.ids == prompt)
        }
    }

    @Test func cancellingKeepsWhatWasWritten() async throws {
        let (model, backend) = try Scripts.saying(
            String(repeating: "again ", count: 12), prompt: prompt)
        let gate = backend.gate(at: 5)
        let generation = model.generate(.ids(prompt))
        await gate.reached()
        generation.cancel()
        let completion = try await generation.result
        var seen = ""
        for try await delta in generation { seen += delta.text }
        #expect(completion.stopReason == .cancelled)
        #expect(completion.text == seen && !seen.isEmpty)
        #expect(completion.ids.count == 4)
        #expect(backend.record.withLock { $0.calls.count } == 5)
        #expect(try await model.respond(to: .ids(prompt)).stopReason == .endOfTurn)
    }

    @Test func aReaderThatGoesAwayStopsTheWriting() async throws {
        let (model, backend) = try Scripts.saying(
            String(repeating: "again ", count: 20), prompt: prompt)
        let gate = backend.gate(at: 2)
        let reader = Task {
            for try await _ in model.generate(.ids(prompt)) {}
        }
        await gate.reached()
        reader.cancel()
        _ = await reader.result
        // The model is free only when the writing has stopped; nobody opens these gates.
        await model.unload()
        #expect(backend.record.withLock { $0.calls.count } == 2)
        _ = backend.gate(at: 4)
        for try await _ in model.generate(.ids(prompt)) { break }
        await model.unload()
        #expect([3, 4].contains(backend.record.withLock { $0.calls.count }))
        #expect(model.state == .unloaded)
    }

    @Test func leavingTheLoopStopsAStreamThatIsHeld() async throws {
        let (model, backend) = try Scripts.saying(
            String(repeating: "again ", count: 20), prompt: prompt)
        _ = backend.gate(at: 3)
        let generation = model.generate(.ids(prompt))
        for try await _ in generation { break }
        let completion = try await generation.result
        #expect(completion.stopReason == .cancelled && completion.ids.count <= 2)
    }

    @Test func textsAreWrittenInTheOrderTheyWereAskedFor() async throws {
        let (model, backend) = try Scripts.saying("ok", prompt: prompt)
        let asked = (0..<20).map { model.generate(.ids([Int32($0), 6, 7])) }
        // Asked for last, it waits for all of them, also for one that is wrong and one that is gone.
        _ = model.generate(.ids([]))
        asked[5].cancel()
        await model.unload()
        #expect(model.state == .unloaded)
        for (number, generation) in asked.enumerated() where number != 5 {
            #expect(try await generation.result.stopReason == .endOfTurn)
        }
        let starts: [Int32] = backend.record.withLock { record in
            record.calls.map(\.ids).filter { $0.count == 3 && $0[0] != 5 }.map { $0[0] }
        }
        var expected = Array(Int32(0)..<20)
        expected.remove(at: 5)
        #expect(starts == expected)
    }

    @Test func aModelThatIsWatchedGoesWithItsLastHandle() async throws {
        var model: Phi3? = try Scripts.saying("ok", prompt: prompt).model
        let states = try #require(model).states()
        model = nil
        var seen = 0
        for await _ in states { seen += 1 }
        #expect(seen == 1)
    }

    /// Wherever it is cancelled, the text so far is a beginning of the whole one.
    @Test func cancelledAtAnyMoment() async throws {
        let text = "Temperature 38.5 °C 🙂 since Monday."
        let whole = Array(text.unicodeScalars)
        for call in 1...12 {
            let (model, backend) = try Scripts.saying(text, prompt: prompt)
            let gate = backend.gate(at: call)
            let generation = model.generate(.ids(prompt))
            await gate.reached()
            generation.cancel()
            let completion = try await generation.result
            #expect(completion.stopReason == .cancelled)
            #expect(completion.ids.count == call - 1)
            #expect(whole.starts(with: completion.text.unicodeScalars))
        }
    }

    @Test func oneThatWaitsCanBeCancelled() async throws {
        let (model, backend) = try Scripts.saying("long", prompt: prompt)
        let gate = backend.gate(at: 1)
        let first = model.generate(.ids(prompt))
        await gate.reached()
        let second = model.generate(.ids(prompt))
        while model.engine.waitingCount == 0 { await Task.yield() }
        second.cancel()
        await #expect(throws: CancellationError.self) { try await second.result }
        gate.open()
        #expect(try await first.result.stopReason == .endOfTurn)
        #expect(backend.record.withLock { $0.calls.filter { $0.ids == prompt }.count } == 1)
    }

    @Test func unloadingWaitsForTheRunningTextAndTheNextLoadsAgain() async throws {
        let (model, backend) = try Scripts.saying("first things first", prompt: prompt)
        let gate = backend.gate(at: 2)
        let running = model.generate(.ids(prompt))
        await gate.reached()
        let unloading = Task { await model.unload() }
        while model.engine.waitingCount == 0 { await Task.yield() }
        #expect(backend.record.withLock { $0.unloads } == 0)
        gate.open()
        #expect(try await running.result.stopReason == .endOfTurn)
        await unloading.value
        #expect(model.state == .unloaded)
        #expect(try await model.respond(to: .ids(prompt)).text == "first things first")
        #expect(backend.record.withLock { $0.loads } == 2)
    }

    @Test func statesAreTold() async throws {
        let (model, _) = try Scripts.saying("ok", prompt: prompt)
        let states = model.states()
        let told = Mutex<[LoadEvent]>([])
        try await model.load { event in told.withLock { $0.append(event) } }
        _ = try await model.respond(to: .ids(prompt))
        await model.unload()
        var seen: [ModelState] = []
        for await state in states {
            seen.append(state)
            if seen.count == 6 { break }
        }
        #expect(
            seen == [.unloaded, .loading(.loading), .ready, .generating, .ready, .unloaded])
        #expect(told.withLock { $0 } == [.loading, .ready])
    }

    @Test func prewarmingReadsAPromptAndOneToken() async throws {
        let (model, backend) = try Scripts.saying("ok", prompt: prompt)
        try await model.prewarm()
        #expect(backend.record.withLock { $0.calls.map(\.ids.count) } == [2, 3])
    }

    @Test func theLockPassesInTheOrderOfAsking() async throws {
        let lock = AsyncMutex()
        let order = Order()
        let (gate, opening) = AsyncStream.makeStream(of: Void.self)
        let (inside, entered) = AsyncStream.makeStream(of: Void.self)
        let holder = Task {
            try await lock.withLock {
                entered.finish()
                for await _ in gate {}
            }
        }
        for await _ in inside {}
        var waiters: [Task<Void, any Error>] = []
        for number in 0..<5 {
            waiters.append(
                Task {
                    try await lock.withLock { order.numbers.withLock { $0.append(number) } }
                })
            while lock.waitingCount < number + 1 { await Task.yield() }
        }
        waiters[2].cancel()
        while lock.waitingCount > 4 { await Task.yield() }
        opening.finish()
        try await holder.value
        for (number, waiter) in waiters.enumerated() where number != 2 { try await waiter.value }
        #expect(order.numbers.withLock { $0 } == [0, 1, 3, 4])
        await #expect(throws: CancellationError.self) { try await waiters[2].value }
    }
}
