import Foundation
import MedPhiKit
import Observation

/// One conversation, one model, one note: everything the screen shows and its buttons do.
///
/// It keeps nothing on disk, opens no connection, and logs no word of a conversation or a note.
@MainActor @Observable public final class NoteSession {
    /// What the session is at.
    public enum Phase: Sendable, Equatable {
        /// No model is open.
        case empty
        /// A model is being opened.
        case opening(LoadEvent?)
        /// A note can be written.
        case ready
        /// A note is being written.
        case writing
    }

    /// Opens a model; `Phi3.load`, or what a test puts in its place.
    public typealias Opener =
        @Sendable (URL, @escaping @Sendable (LoadEvent) -> Void) async throws -> Phi3

    /// What it is at.
    public private(set) var phase = Phase.empty
    /// What the screen says of the open model.
    public private(set) var card: ModelCard?
    /// What can be put on the model.
    public private(set) var adapters: [AdapterChoice] = []
    /// What is on it for the next note.
    public var adapter = AdapterChoice.base
    /// The conversation as it was typed, pasted or opened.
    public var text = ""
    /// The section of the note to write, as `GENHX`; empty: the whole note.
    public var section = ""
    /// The note; once it is written, a person corrects it here.
    public var note = ""
    /// Whether a person says to have read and corrected the note.
    public var isChecked = false
    /// What of the conversation was not read; `nil`: all of it was.
    public private(set) var leftOut: String?
    /// How long the note took, once it is there.
    public private(set) var figures: NoteFigures?
    /// What went wrong, in the words of the error: where, what, and what to do.
    public private(set) var problem: String?

    private let opener: Opener
    private var base: Phi3?
    private var access: [FileAccess] = []
    private var running: NoteStream?
    private var isStopped = false
    private var attempts = 0

    /// The longest note, in tokens, where the context has room for it.
    static let longestNote = 512

    /// A session that opens models with `Phi3.load`.
    public convenience init() {
        self.init { url, progress in try await Phi3.load(url, progress: progress) }
    }

    /// A session that opens models another way.
    public init(opener: @escaping Opener) { self.opener = opener }

    /// Whether a note can be begun.
    public var canWrite: Bool { phase == .ready && !isBlank }
    /// Whether there is something to copy.
    public var canCopy: Bool { phase != .writing && !note.isEmpty }
    /// The conversation in numbers; `nil`: there is none, or its tags cannot be read.
    public var summary: String? {
        guard !isBlank, let read = try? Conversation(text: text) else { return nil }
        let words = read.words.split(whereSeparator: \.isWhitespace).count
        return "\(Wording.count(read.turns.count, "turn")), \(Wording.count(words, "word"))"
    }

    private var isBlank: Bool { text.allSatisfy(\.isWhitespace) }

    /// Opens a bundle, or a folder or file with a Phi-3, in place of the one that is open.
    public func open(_ url: URL) async {
        stop()
        attempts += 1
        let attempt = attempts
        let file = FileAccess(url)
        (phase, problem) = (.opening(nil), nil)
        let (events, report) = AsyncStream.makeStream(of: LoadEvent.self)
        let listener = Task {
            for await event in events where attempt == self.attempts {
                if case .opening = self.phase { self.phase = .opening(event) }
            }
        }
        let result: Result<Phi3, any Error>
        do {
            result = .success(try await opener(file.url) { report.yield($0) })
        } catch {
            result = .failure(error)
        }
        report.finish()
        await listener.value
        guard attempt == attempts else {
            // Another one was asked for meanwhile.
            if case .success(let late) = result { await late.unload() }
            return
        }
        await take(result, file)
    }

    private func take(_ result: Result<Phi3, any Error>, _ file: FileAccess) async {
        switch result {
        case .success(let model):
            let old = base
            base = model
            access = [file]
            card = ModelCard(model)
            adapters = [.base] + model.adapters.map { .named($0) }
            // A base has never seen a note; what the bundle brings along has.
            adapter = adapters.count > 1 ? adapters[1] : .base
            phase = .ready
            await old?.unload()
        case .failure(let error):
            phase = base == nil ? .empty : .ready
            problem = NoteSession.words(error)
        }
    }

    /// Adds an adapter from a file or folder, once it is known to fit the model.
    public func addAdapter(_ url: URL) async {
        guard let base, phase == .ready else { return }
        let file = FileAccess(url)
        let choice = AdapterChoice.file(url)
        do {
            _ = try await choice.applied(to: base)
            access.append(file)
            if !adapters.contains(choice) { adapters.append(choice) }
            (adapter, problem) = (choice, nil)
        } catch {
            problem = NoteSession.words(error)
        }
    }

    /// Reads a conversation from a text file.
    public func openConversation(_ url: URL) {
        let file = FileAccess(url)
        do {
            let data = try Data(contentsOf: file.url)
            text = try Conversation(utf8: data).text
            problem = nil
        } catch {
            problem = NoteSession.words(error)
        }
    }

    /// Shows what a file dialog reports.
    public func fail(_ error: any Error) { problem = NoteSession.words(error) }

    /// Takes what went wrong off the screen.
    public func dismissProblem() { problem = nil }

    /// Writes the note of the conversation; returns when it is finished, stopped or has failed.
    public func write() async {
        guard let base, canWrite else { return }
        (phase, problem, isStopped) = (.writing, nil, false)
        (note, isChecked, leftOut, figures) = ("", false, nil, nil)
        do {
            let conversation = try Conversation(text: text)
            let model = try await adapter.applied(to: base)
            if !isStopped { try await follow(model, conversation) }
        } catch is CancellationError {
            // Stopped before its turn came: nothing was written.
        } catch {
            problem = NoteSession.words(error)
        }
        running = nil
        if phase == .writing { phase = .ready }
    }

    private func follow(_ model: Phi3, _ conversation: Conversation) async throws {
        // Conversation and note share the context; most of it is for the conversation.
        let longest = max(1, min(NoteSession.longestNote, model.contextLength / 4))
        let part = section.filter { !$0.isWhitespace }
        let stream = model.generateNote(
            from: conversation, section: part.isEmpty ? nil : part,
            options: NoteOptions(generation: GenerationOptions(maxTokens: longest)))
        running = stream
        for try await event in stream {
            switch event {
            case .started(let start): leftOut = Wording.leftOut(start)
            case .delta(let piece, _): note += piece
            case .finished(let written, let completion):
                note = written.text
                figures = NoteFigures(completion)
            }
        }
    }

    /// Stops the note that is being written; what is there stays.
    public func stop() {
        isStopped = true
        running?.cancel()
    }

    /// The note as it is copied: a draft says that it is one.
    public var copied: String { isChecked ? note : "\(note)\n\n\(Wording.draft)" }

    private static func words(_ error: any Error) -> String {
        (error as? Phi3Error)?.description ?? error.localizedDescription
    }
}
