import Foundation
import MedPhiKit
import Testing

@testable import MedPhiSession

@MainActor @Suite("A session")
struct NoteSessionTests {
    static let note = "Subjective: an earache for four days.\nPlan: Quilamine 40 mg."

    /// A session with an open model that writes `note`.
    private func opened(
        saying text: String = note, context: Int = 512, gate: Gate? = nil,
        failure: Phi3Error? = nil, adapters: [String] = []
    ) async throws -> NoteSession {
        let backend = try Scripts.backend(
            saying: text, context: context, gate: gate, failure: failure)
        let model = try Scripts.model(backend, adapters: adapters)
        let session = NoteSession { _, _ in model }
        await session.open(Scripts.tiny)
        session.text = Scripts.conversation
        return session
    }

    @Test("begins without a model and writes nothing")
    func beginsEmpty() async {
        let session = NoteSession { _, _ in throw CancellationError() }
        session.text = Scripts.conversation
        #expect(session.phase == .empty && !session.canWrite && session.card == nil)
        await session.write()
        #expect(session.note.isEmpty && session.problem == nil)
    }

    @Test("shows what it opened")
    func showsTheModel() async throws {
        let session = try await opened(adapters: ["soap", "letter"])
        #expect(session.phase == .ready && session.card?.name == "script")
        let rows = session.card?.rows.map { "\($0.title): \($0.value)" } ?? []
        #expect(rows.contains("Size on disk: 4.0 MB"))
        #expect(rows.contains("Context: 512 tokens"))
        #expect(rows.contains { $0.hasPrefix("Verified: its program was run on another machine") })
        #expect(session.adapters == [.base, .named("soap"), .named("letter")])
        #expect(session.adapter == .named("soap"))
    }

    @Test("tells how far opening is")
    func tellsProgress() async throws {
        let (gate, backend) = (Gate(), try Scripts.backend(saying: "x"))
        let model = try Scripts.model(backend)
        let session = NoteSession { _, report in
            report(.verifying(done: 1_000_000, total: 5_000_000))
            await gate.pass()
            return model
        }
        let opening = Task { await session.open(Scripts.tiny) }
        let told = LoadEvent.verifying(done: 1_000_000, total: 5_000_000)
        try await until { session.phase == .opening(told) }
        #expect(Wording.opening(told) == "Checking the files: 1.0 MB of 5.0 MB")
        await gate.open(1)
        await opening.value
        #expect(session.phase == .ready)
    }

    @Test("of two models asked for, the later one stays and the other is given back")
    func laterOneStays() async throws {
        let gate = Gate()
        let backends = [try Scripts.backend(saying: "a"), try Scripts.backend(saying: "b")]
        let models = try backends.map { try Scripts.model($0) }
        let session = NoteSession { url, _ in
            if url.lastPathComponent == "slow" {
                await gate.pass()
                return models[0]
            }
            return models[1]
        }
        let slow = Task { await session.open(URL(fileURLWithPath: "/slow")) }
        try await until { session.phase == .opening(nil) }
        await session.open(URL(fileURLWithPath: "/fast"))
        #expect(session.phase == .ready)
        await gate.open(1)
        await slow.value
        #expect(backends[0].unloads.withLock { $0 } == 1)
        #expect(backends[1].unloads.withLock { $0 } == 0)
        #expect(session.phase == .ready)
    }

    @Test("a model that cannot be opened leaves the one that is")
    func failureToOpen() async throws {
        let good = try Scripts.model(try Scripts.backend(saying: "a"))
        let details = ErrorDetails(
            place: "notes.medphi", found: "no manifest", expected: "a bundle", advice: "Export it.")
        let session = NoteSession { url, _ in
            if url == Scripts.tiny { return good }
            throw Phi3Error.file(details)
        }
        await session.open(URL(fileURLWithPath: "/nothing"))
        #expect(session.phase == .empty)
        #expect(session.problem == "notes.medphi: no manifest. Expected a bundle. Export it.")
        await session.open(Scripts.tiny)
        #expect(session.phase == .ready && session.problem == nil)
        await session.open(URL(fileURLWithPath: "/nothing"))
        #expect(session.phase == .ready && session.card != nil && session.problem != nil)
    }

    @Test("writes the note and says how long it took")
    func writes() async throws {
        let session = try await opened()
        #expect(session.summary == "2 turns, 12 words")
        await session.write()
        #expect(session.note == Self.note)
        #expect(session.phase == .ready && session.problem == nil && session.leftOut == nil)
        let figures = try #require(session.figures)
        #expect(figures.line.contains(" tokens read in ") && figures.line.contains(" written"))
        #expect(figures.ending == nil)
        await session.write()
        #expect(session.note == Self.note)
    }

    @Test("the note grows while it is written, and stops where it is told to")
    func stops() async throws {
        let gate = Gate()
        let session = try await opened(gate: gate)
        let writing = Task { await session.write() }
        await gate.open(6)
        try await until { !session.note.isEmpty }
        #expect(session.phase == .writing && !session.canCopy && !session.canWrite)
        session.stop()
        // Enough for all of it, if nothing stopped it.
        await gate.open(200)
        await writing.value
        #expect(session.phase == .ready)
        #expect(!session.note.isEmpty && Self.note.hasPrefix(session.note))
        #expect(session.note.count < Self.note.count)
        #expect(session.figures?.ending == "The note is cut off: you stopped it.")
    }

    @Test("a conversation that is too long is shortened, and that is said")
    func shortens() async throws {
        let session = try await opened(saying: "Short.", context: 160)
        session.text = (0..<40).map { "Patient: the pain came back on day \($0)." }
            .joined(separator: "\n")
        await session.write()
        #expect(session.note == "Short." && session.problem == nil)
        #expect(session.leftOut?.contains("turns in its middle were left out") == true)
    }

    @Test("a note that reaches the longest length is said to be cut off")
    func cutOff() async throws {
        let session = try await opened(
            saying: (0..<90).map { "word\($0)" }.joined(separator: " "), context: 160)
        await session.write()
        #expect(session.figures?.ending?.contains("longest length") == true)
    }

    @Test("an error is shown in its own words, and the session goes on")
    func showsErrors() async throws {
        let details = ErrorDetails(
            place: "the package", found: "no answer", expected: "logits", advice: "Open it again.")
        let session = try await opened(failure: .modelLoad(details))
        await session.write()
        #expect(session.problem == "the package: no answer. Expected logits. Open it again.")
        #expect(session.phase == .ready && session.figures == nil)
        session.dismissProblem()
        #expect(session.problem == nil && session.canWrite)
        session.adapter = .named("nowhere")
        await session.write()
        #expect(session.problem?.contains("nowhere") == true && session.phase == .ready)
    }

    @Test("a draft is copied as one until a person says to have corrected it")
    func copies() async throws {
        let session = try await opened()
        #expect(!session.canCopy)
        await session.write()
        #expect(session.canCopy && session.copied == "\(Self.note)\n\n\(Wording.draft)")
        session.note += " Review in a week."
        session.isChecked = true
        #expect(session.copied == "\(Self.note) Review in a week.")
        await session.write()
        #expect(!session.isChecked)
    }

    @Test("adapters from files are added once they fit")
    func addsAdapters() async throws {
        let session = try await opened()
        await session.addAdapter(Scripts.tiny.appendingPathComponent("model.safetensors"))
        #expect(session.problem != nil && session.adapters == [.base])
        #expect(session.adapter == .base)
    }

    @Test("a conversation is read from a text file, with its speakers in order")
    func opensText() async throws {
        let session = try await opened()
        let url = FileManager.default.temporaryDirectory
            .appendingPathComponent("medphi-\(UUID().uuidString).txt")
        defer { try? FileManager.default.removeItem(at: url) }
        try Data("Docotr: Any fever?\r\nPt: No,\r\nnone.".utf8).write(to: url)
        session.openConversation(url)
        #expect(session.text == "Doctor: Any fever?\nPatient: No, none.")
        try Data([0xFF, 0xFE, 0x41]).write(to: url)
        session.openConversation(url)
        #expect(session.problem?.contains("UTF-8") == true)
        #expect(session.text == "Doctor: Any fever?\nPatient: No, none.")
    }

    @Test("opens and runs a real model by itself")
    func runsARealModel() async throws {
        let session = NoteSession()
        await session.open(Scripts.tiny)
        #expect(session.problem == nil && session.phase == .ready)
        #expect(session.card?.rows.contains { $0.value == "the processor" } == true)
        session.text = Scripts.conversation
        let writing = Task { await session.write() }
        try await until { session.phase == .writing && session.note.count > 3 }
        session.stop()
        await writing.value
        #expect(session.problem == nil && session.phase == .ready && session.note.count > 3)
        await session.open(Scripts.root)
        #expect(session.problem?.contains("config.json") == true && session.phase == .ready)
    }

    private func until(_ condition: () -> Bool) async throws {
        let limit = ContinuousClock.now + .seconds(20)
        while !condition() {
            try #require(ContinuousClock.now < limit, "it did not come")
            try await Task.sleep(for: .milliseconds(2))
        }
    }
}
