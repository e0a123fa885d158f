import Foundation
import Testing

@testable import Phi3Core

@Suite struct GenerationTests {
    let prompt: [Int32] = [5, 6, 7]

    @Test func textIdsAndReasonAreTheModels() async throws {
        let (model, backend) = try Scripts.saying("No fever — 38.5 °C 🙂.", prompt: prompt)
        let generation = model.generate(.ids(prompt))
        var text = ""
        var ids: [Int32] = []
        for try await delta in generation {
            text += delta.text
            ids += delta.ids
        }
        let completion = try await generation.result
        #expect(text == "No fever — 38.5 °C 🙂.")
        #expect(completion.text == text)
        #expect(completion.ids == ids)
        #expect(ids == (try Scripts.tokenizer.get()).encode(text))
        #expect(completion.stopReason == .endOfTurn)
        #expect(completion.promptTokens == 3)
        // One call for each token and one for the end, each with all that came before.
        let calls = backend.record.withLock { $0.calls }
        #expect(calls.map(\.ids) == (0...ids.count).map { prompt + ids.prefix($0) })
        #expect(completion.timings.timeToFirstToken > 0)
        #expect(completion.timings.prefillTokensPerSecond > 0)
    }

    @Test func endsAtTheLimitAtAFullContextAndAtAStopString() async throws {
        let (model, _) = try Scripts.saying("one two three four five six", prompt: prompt)
        let short = try await model.respond(to: .ids(prompt), GenerationOptions(maxTokens: 2))
        #expect(short.stopReason == .maxTokens)
        #expect(short.ids.count == 2)
        let (narrow, _) = try Scripts.saying(
            "one two three four five six", prompt: prompt, context: 6)
        let full = try await narrow.respond(to: .ids(prompt))
        #expect(full.stopReason == .contextFull)
        #expect(full.ids.count == 3)
        let stopped = try await model.respond(
            to: .ids(prompt), GenerationOptions(stopStrings: ["three"]))
        #expect(stopped.stopReason == .stopString("three"))
        #expect(stopped.text == "one two ")
    }

    /// What never got its last byte is no character, and a stop string may come with the last piece.
    @Test func halfACharacterIsLeftOut() async throws {
        let tokenizer = try Scripts.tokenizer.get()
        let whole = tokenizer.encode("a🙂")
        let bytes = try #require(
            tokenizer.encode("🙂").first { tokenizer.decode([$0]) == "\u{FFFD}" })
        let script = [whole[0], bytes, tokenizer.endID]
        let model = try Scripts.model(ScriptedBackend { ids, _ in script[ids.count - 3] })
        let completion = try await model.respond(to: .ids(prompt))
        #expect(!completion.text.unicodeScalars.contains("\u{FFFD}"))
        #expect(completion.ids == [whole[0], bytes])
        let (line, _) = try Scripts.saying("ab\n", prompt: prompt)
        let stopped = try await line.respond(
            to: .ids(prompt), GenerationOptions(stopStrings: ["\n"]))
        #expect(stopped.text == "ab")
        #expect(stopped.stopReason == .stopString("\n"))
    }

    @Test func paddingIsNeverChosen() async throws {
        // The tokenizer has 1152 ids; this backend has rows behind them, and favours one.
        let backend = try ScriptedBackend(rows: 1200) { _, _ in 1190 }
        let completion = try await Scripts.model(backend).respond(
            to: .ids(prompt), GenerationOptions(maxTokens: 1))
        #expect(completion.ids == [0])
    }

    @Test func wrongPromptsAndOptionsAreRefused() async throws {
        let (model, backend) = try Scripts.saying("x", prompt: prompt, context: 8)
        let wrong: [(Prompt, GenerationOptions, String)] = [
            (.ids([]), .init(), "no tokens"),
            (.ids([1152]), .init(), "id 1152"),
            (.ids([-1]), .init(), "id -1"),
            (.ids(Array(repeating: 5, count: 8)), .init(), "8 tokens"),
            (.ids(prompt), .init(maxTokens: 0), "maxTokens"),
            (.ids(prompt), .init(sampling: SamplingOptions(temperature: -1)), "temperature"),
            (.ids(prompt), .init(stopStrings: [""]), "stop strings"),
        ]
        for (prompt, options, expected) in wrong {
            let error = await #expect(throws: Phi3Error.self) {
                try await model.respond(to: prompt, options)
            }
            #expect(error?.description.contains(expected) == true)
        }
        #expect(backend.record.withLock { $0.calls.isEmpty })
    }

    @Test func failuresAreTypedAndTheModelWorksAfterwards() async throws {
        struct Odd: Error {}
        let (model, backend) = try Scripts.saying("fine", prompt: prompt)
        backend.record.withLock { $0.failures = [Odd()] }
        await #expect(throws: Phi3Error.self) { try await model.respond(to: .ids(prompt)) }
        guard case .failed = model.state else {
            Issue.record("state is \(model.state)")
            return
        }
        #expect(try await model.respond(to: .ids(prompt)).text == "fine")
        #expect(model.state == .ready)
        let (late, other) = try Scripts.saying("fine", prompt: prompt)
        other.record.withLock { $0.loadFailures = [Odd()] }
        await #expect(throws: Phi3Error.self) { try await late.load() }
        #expect(try await late.respond(to: .ids(prompt)).text == "fine")
        #expect(other.record.withLock { $0.loads } == 2)
    }

    @Test func logitsOfAnotherSizeAreRefused() async throws {
        struct Short: TokenBackend {
            let facts: BackendFacts
            func load(_ report: @escaping @Sendable (LoadEvent) -> Void) async throws {}
            func logits(after ids: [Int32], adapter: BoundAdapter?) async throws -> [Float] { [1] }
            func unload() async {}
            func save(_ url: URL, adapter: BoundAdapter?, replace: Bool) async throws {}
        }
        let facts = try ScriptedBackend { _, _ in 0 }.facts
        let model = try Phi3(
            backend: Short(facts: facts), tokenizer: Scripts.tokenizer.get(),
            info: ModelInfo(
                name: "short", source: .checkpoint(Small.base),
                fingerprint: facts.target.fingerprint, byteCount: 0))
        let error = await #expect(throws: Phi3Error.self) {
            try await model.respond(to: .ids(prompt))
        }
        #expect(error?.description.contains("1 of them") == true)
    }

    @Test func wordsOfAConversationAreInNoError() async throws {
        let (model, _) = try Scripts.saying("x", prompt: prompt, context: 24)
        let conversation = Conversation(turns: [
            try Turn(speaker: "Patient", text: String(repeating: "secretword ", count: 40))
        ])
        let options = NoteOptions(generation: GenerationOptions(maxTokens: 4), shortens: false)
        let error = await #expect(throws: Phi3Error.self) {
            try await model.generateNote(from: conversation, options: options).result
        }
        #expect(error?.description.contains("secretword") == false)
    }
}
