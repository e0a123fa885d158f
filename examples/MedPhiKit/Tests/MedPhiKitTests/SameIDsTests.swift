import Foundation
import Testing

@testable import MedPhiKit

/// Ten conversations, and what the Python package wrote about each.
private struct RecordedNotes {
    struct Case {
        let conversation: String
        let prompt: [Int32]
        /// Per model, "base" or "notes".
        let written: [String: Written]
    }

    struct Written {
        let greedy: [Int32]
        let sampled: [Int32]
        let note: String
    }

    let context: Int
    let sampling: SamplingOptions
    let maxTokens: Int
    let cases: [Case]

    init() throws {
        let file = Places.recorded.appendingPathComponent("notes.json")
        let value = try FileBytes.json(file)
        func ids(_ value: JSONValue?) throws -> [Int32] {
            try #require(value?.array).map { Int32(try #require($0.integer)) }
        }
        let sampling = try #require(value["sampling"])
        self.sampling = SamplingOptions(
            temperature: try #require(sampling["temperature"]?.double),
            topP: try #require(sampling["top_p"]?.double),
            seed: UInt64(try #require(sampling["seed"]?.integer)))
        context = try #require(value["context"]?.integer)
        maxTokens = try #require(value["max_tokens"]?.integer)
        cases = try #require(value["cases"]?.array).map { item in
            var written: [String: Written] = [:]
            for name in ["base", "notes"] {
                written[name] = Written(
                    greedy: try ids(item[name]?["greedy"]),
                    sampled: try ids(item[name]?["sampled"]),
                    note: try #require(item[name]?["note"]?.string))
            }
            return Case(
                conversation: try #require(item["conversation"]?.string),
                prompt: try ids(item["prompt"]), written: written)
        }
    }
}

/// The ids that Swift writes are those that Python writes.
@Suite(.serialized) struct SameIDsTests {
    @Test func checkpointsWriteTheIDsOfPython() async throws {
        let recorded = try RecordedNotes()
        let base = try await Phi3.load(
            Places.tiny, options: LoadOptions(context: recorded.context))
        try await compare(base, recorded)
    }

    @Test(.enabled(if: Places.demo != nil, "no demo bundle: set MEDPHI_DEMO_BUNDLE"))
    func bundlesWriteTheIDsOfPython() async throws {
        let base = try await Phi3.load(try #require(Places.demo), backend: .reference)
        try await compare(base, try RecordedNotes())
    }

    @Test(.enabled(if: Places.demo != nil, "no demo bundle: set MEDPHI_DEMO_BUNDLE"))
    func theCoreMLLoopWritesTheIDsOfPython() async throws {
        let room = try Room()
        var options = LoadOptions(cache: room["compiled"])
        options.allowsSubstitute = true
        let base = try await Phi3.load(
            try #require(Places.demo), backend: .coreML, options: options)
        #expect(base.backendName == "core-ml")
        try await compare(base, try RecordedNotes())
    }

    @Test(.enabled(if: Places.builtIn != nil, "no such bundle: set MEDPHI_BUNDLES"))
    func adaptersThatAreBuiltInWriteTheIDsOfPython() async throws {
        let base = try await Phi3.load(try #require(Places.builtIn), backend: .reference)
        try await compare(base, try RecordedNotes(), adapter: "notes")
    }

    /// Debug builds compute slowly: they compare the beginning of one note, unless MEDPHI_OPTIMISE is 1.
    private func compare(
        _ base: Phi3, _ recorded: RecordedNotes, adapter: AdapterSource = .file(Places.notes)
    ) async throws {
        #if DEBUG && !OPTIMISED
            let (count, longest) = (1, 12)
        #else
            let (count, longest) = (recorded.cases.count, recorded.maxTokens)
        #endif
        let handles = [("base", base), ("notes", try await base.applyLoRA(adapter))]
        #expect(base.contextLength == recorded.context)
        for (name, model) in handles {
            for item in recorded.cases.prefix(count) {
                let expected = try #require(item.written[name])
                let greedy = GenerationOptions(maxTokens: longest)
                let stream = model.generateNote(
                    from: try Conversation(text: item.conversation),
                    options: NoteOptions(generation: greedy))
                let result = try await stream.result
                #expect(result.completion.ids == Array(expected.greedy.prefix(longest)))
                #expect(result.start.promptTokens == item.prompt.count)
                if longest == recorded.maxTokens { #expect(result.note.text == expected.note) }
                let drawn = GenerationOptions(sampling: recorded.sampling, maxTokens: longest)
                let sampled = try await model.respond(to: .ids(item.prompt), drawn)
                #expect(sampled.ids == Array(expected.sampled.prefix(longest)))
            }
        }
    }
}
