import Foundation
import MedPhiKit
import Testing

/// The code that README.md shows, which a test of the Python suite holds against it line by line.
private enum Shown {
    static func draft(_ bundleURL: URL, _ transcript: String, keepIn folder: URL) async throws {
        let base = try await Phi3.load(bundleURL)
        let model = try await base.applyLoRA("soap")
        let conversation = try Conversation(text: transcript)
        for try await event in model.generateNote(from: conversation) {
            switch event {
            case .started(let start): print("\(start.leftOutTurns) turns did not fit")
            case .delta(let text, _): print(text, terminator: "")
            case .finished(_, let completion): print("\n\(completion)")
            }
        }
        try await model.save(folder.appendingPathComponent("with-soap.medphi"), replace: true)
        try await model.saveLoRA(folder.appendingPathComponent("soap.safetensors"), replace: true)
    }

    static func printing(_ model: Phi3, _ conversation: Conversation) async throws {
        for try await event in model.generateNote(from: conversation) {
            if case .delta(let text, _) = event { print(text, terminator: "") }
        }
    }

    static func changingAdapters(_ base: Phi3, _ file: URL) async throws {
        let soap = try await base.applyLoRA("soap")
        let letter = try await base.applyLoRA(.file(file))
        let plain = letter.removingLoRA()
        print(soap.adapters, letter.activeAdapter?.name ?? "base", plain.contextLength)
    }

    static func drawing(_ model: Phi3, _ conversation: Conversation) async throws {
        let sampling = SamplingOptions(temperature: 0.7, topP: 0.9, seed: 17)
        let options = NoteOptions(generation: .init(sampling: sampling, maxTokens: 200))
        let stream = model.generateNote(from: conversation, section: "GENHX", options: options)
        Task {
            try await Task.sleep(for: .seconds(30))
            stream.cancel()
        }
        let result = try await stream.result
        print(result.note.text, result.completion.stopReason)
    }

    static func fetching(_ address: URL, _ sums: String) async throws {
        let store = try BundleStore(options: StoreOptions(allowsNetwork: true))
        let bundle = try await store.install("notes", from: address, version: sums)
        let base = try await Phi3.load(bundle.url) { event in print(event) }
        print(base.info.name, base.plan().verdict)
    }
}

@Suite struct ReadmeTests {
    @Test func whatItShowsRefusesWhatIsNotThere() async {
        let nowhere = URL(fileURLWithPath: "/nowhere/notes.medphi")
        await #expect(throws: Phi3Error.self) {
            try await Shown.draft(nowhere, "Doctor: Any fever?", keepIn: nowhere)
        }
        await #expect(throws: Phi3Error.self) {
            try await Shown.fetching(URL(fileURLWithPath: "/nowhere"), "")
        }
    }
}
