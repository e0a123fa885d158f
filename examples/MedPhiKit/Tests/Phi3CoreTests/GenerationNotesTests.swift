import Foundation
import Testing

@testable import Phi3Core

@Suite struct GenerationNotesTests {
    let conversation = Conversation(turns: [
        try! Turn(speaker: "Doctor", text: "Any fever?"),
        try! Turn(speaker: "Patient", text: "No."),
    ])

    private func model(
        saying text: String, context: Int = 256, support: BackendFacts.AdapterSupport = .any
    ) throws -> (Phi3, ScriptedBackend) {
        let tokenizer = try Scripts.tokenizer.get()
        let answer = tokenizer.encode(text) + [tokenizer.endID]
        let begin = tokenizer.assistantID
        let backend = try ScriptedBackend(context: context, support: support) { ids, _ in
            let from = ids.lastIndex(of: begin).map { ids.count - $0 - 1 } ?? 0
            return answer[min(from, answer.count - 1)]
        }
        return (try Scripts.model(backend), backend)
    }

    @Test func theNoteIsStreamedWithoutSpaceAround() async throws {
        let (model, backend) = try model(saying: "\n  No fever.\n Well. \n\n")
        var events: [NoteEvent] = []
        for try await event in model.generateNote(from: conversation, section: "GENHX") {
            events.append(event)
        }
        let section = NoteSection(name: "GENHX")
        let pieces = events.compactMap { event -> String? in
            guard case .delta(let text, section) = event else { return nil }
            return text
        }
        #expect(pieces.joined() == "No fever.\n Well.")
        guard case .finished(let note, let completion) = events.last,
            case .started(let start) = events.first
        else {
            Issue.record("no first or last event")
            return
        }
        #expect(note.text == "No fever.\n Well.")
        #expect(note.section == section)
        #expect(note.adapter == nil)
        #expect(completion.text == "\n  No fever.\n Well. \n\n")
        #expect(start.isWhole)
        let prompt = try Scripts.tokenizer.get().encodePrompt(
            conversation, section: "GENHX", maxLength: 256, reserve: 128)
        #expect(backend.record.withLock { $0.calls.first?.ids } == prompt.ids)
        #expect(start.promptTokens == prompt.ids.count)
    }

    @Test func whatIsPrintedShowsNoWords() async throws {
        let (model, _) = try model(saying: "secretword secretword")
        let words = try Conversation(text: "Patient: secretword")
        var seen: [any CustomStringConvertible & Sendable] = []
        for try await event in model.generateNote(from: words) { seen.append(event) }
        let prompt = Prompt.user("secretword")
        for try await delta in model.generate(prompt) { seen.append(delta) }
        let result = try await model.generateNote(
            from: words, options: NoteOptions(generation: .init(stopStrings: ["word"]))
        ).result
        seen +=
            [prompt, words, result, result.note, result.completion]
            as [any CustomStringConvertible & Sendable]
        seen.append(ChatMessage(role: .user, content: "secretword"))
        for item in seen { #expect(!"\(item) \(String(reflecting: item))".contains("secret")) }
        // Values inside other values are printed by their descriptions too.
        #expect(!"\([result]) \(Optional(prompt) as Any)".contains("secret"))
    }

    @Test func aLongConversationIsShortenedAndSaysSo() async throws {
        let turns = try (0..<60).map { try Turn(speaker: "Patient", text: "Number \($0), yes.") }
        let long = Conversation(turns: turns)
        let (model, _) = try model(saying: "Fine.")
        let options = NoteOptions(generation: GenerationOptions(maxTokens: 40))
        let result = try await model.generateNote(from: long, options: options).result
        #expect(result.start.leftOutTurns > 0)
        #expect(result.start.promptTokens <= 256 - 40)
        #expect(result.note.text == "Fine.")
        var strict = options
        strict.shortens = false
        await #expect(throws: Phi3Error.self) {
            try await model.generateNote(from: long, options: strict).result
        }
        await #expect(throws: Phi3Error.self) {
            try await model.generateNote(
                from: long, options: NoteOptions(generation: GenerationOptions(maxTokens: 256))
            ).result
        }
    }

    @Test func anEmptyConversationIsRefused() async throws {
        let (model, _) = try model(saying: "x")
        await #expect(throws: Phi3Error.self) {
            try await model.generateNote(from: Conversation(turns: [])).result
        }
    }

    @Test func adaptersAreHandlesOnOneModel() async throws {
        let (base, backend) = try model(saying: "ok")
        let tuned = try await base.applyLoRA(.file(Small.file))
        let same = try await base.applyLoRA(.named(Small.file.path))
        let peft = try await base.applyLoRA(
            .file(Small.peft), options: AdapterOptions(allowsUnstatedBase: true))
        #expect(base.activeAdapter == nil)
        #expect(tuned.activeAdapter == same.activeAdapter)
        #expect(tuned.activeAdapter != peft.activeAdapter)
        #expect(tuned.removingLoRA().activeAdapter == nil)
        _ = try await base.respond(to: .ids([5]))
        _ = try await tuned.respond(to: .ids([5]))
        _ = try await tuned.removingLoRA().respond(to: .ids([5]))
        let used = backend.record.withLock { $0.calls.filter { $0.ids == [5] }.map(\.adapter) }
        #expect(used == [nil, tuned.activeAdapter, nil])
        #expect(backend.record.withLock { $0.loads } == 1)
    }

    @Test func wrongAdaptersAreRefused() async throws {
        let (model, _) = try model(saying: "ok")
        let unknown = await #expect(throws: Phi3Error.self) {
            try await model.applyLoRA("no-such-name")
        }
        #expect(unknown?.description.contains("no-such-name") == true)
        // PEFT's folders do not say which base they belong to.
        await #expect(throws: Phi3Error.self) { try await model.applyLoRA(.file(Small.peft)) }
        let (fused, _) = try self.model(
            saying: "ok", support: .none("its adapter is folded into the weights"))
        let refused = await #expect(throws: Phi3Error.self) {
            try await fused.applyLoRA(.file(Small.file))
        }
        #expect(refused?.description.contains("folded into the weights") == true)
        let (built, _) = try self.model(saying: "ok", support: .builtIn(["soap"]))
        let other = await #expect(throws: Phi3Error.self) {
            try await built.applyLoRA(.file(Small.file))
        }
        #expect(other?.description.contains("soap") == true)
    }

    @Test func anAdapterIsSavedByItselfAndReadAgain() async throws {
        let folder = try TestFolder()
        let (base, backend) = try model(saying: "ok")
        await #expect(throws: Phi3Error.self) { try await base.saveLoRA(folder["a.safetensors"]) }
        let tuned = try await base.applyLoRA(.file(Small.file))
        let place = folder["medical_changes.safetensors"]
        try await tuned.saveLoRA(place)
        #expect(
            try await base.applyLoRA(.file(place)).activeAdapter?.sha256
                == tuned.activeAdapter?.sha256)
        await #expect(throws: Phi3Error.self) { try await tuned.saveLoRA(place) }
        try await tuned.saveLoRA(place, replace: true)
        try await tuned.save(folder["whole"])
        #expect(backend.record.withLock { $0.saved } == [folder["whole"]])
    }

    @Test func tokensAreCountedAsTheyAreRead() async throws {
        let (model, backend) = try model(saying: "ok")
        let prompt = Prompt.user("Any fever? <|end|>")
        let count = try model.countTokens(prompt)
        _ = try await model.respond(to: prompt)
        #expect(backend.record.withLock { $0.calls.first?.ids.count } == count)
        // Words that look like a token stay words.
        let end = try Scripts.tokenizer.get().endID
        #expect(backend.record.withLock { $0.calls[0].ids.filter { $0 == end }.count } == 1)
    }
}

@Suite struct MemoryPlanTests {
    let needs = MemoryNeeds(weights: 1000, keyValuePerToken: 10, adapters: 200)

    @Test func fitsReducesOrRefuses() {
        #expect(MemoryPlan(needs, context: 64, available: nil).verdict == .fits)
        #expect(MemoryPlan(needs, context: 64, available: 4000).needed == 1840)
        #expect(MemoryPlan(needs, context: 64, available: 4000).verdict == .fits)
        // 2800 less an eighth is 2450: 1250 are left for keys and values, which is 125 tokens.
        #expect(MemoryPlan(needs, context: 512, available: 2800).verdict == .reduceContext(to: 64))
        #expect(MemoryPlan(needs, context: 512, available: 1200).verdict == .refuse)
        #expect(MemoryPlan(needs, context: 512, available: 0).verdict == .refuse)
    }

    @Test func hostileSizesDoNotOverflow() {
        let huge = MemoryNeeds(weights: .max, keyValuePerToken: .max, adapters: .max)
        #expect(huge.bytes(context: .max) == .max)
        #expect(MemoryPlan(huge, context: .max, available: 1 << 40).verdict == .refuse)
    }

    @Test func theSystemIsAsked() throws {
        let peak = try #require(SystemMemory.peak())
        #expect(peak > 1 << 20)
        #if os(Linux)
            #expect(try #require(SystemMemory.available()) > 1 << 20)
        #endif
    }
}
