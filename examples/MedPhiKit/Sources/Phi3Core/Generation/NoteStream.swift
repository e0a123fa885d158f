/// A part of a clinical note.
public struct NoteSection: Sendable, Hashable {
    /// The section that was asked for, as `GENHX`; `nil`: the whole note.
    public let name: String?

    /// Makes a section.
    public init(name: String?) { self.name = name }
}

/// A note that a model wrote. It must be read and corrected by a clinician.
public struct ClinicalNote: Sendable, Equatable, CustomStringConvertible {
    /// Its text.
    public let text: String
    /// What of a note it is.
    public let section: NoteSection
    /// The adapter that it was written with.
    public let adapter: AdapterID?

    /// How long it is, without the words.
    public var description: String { "ClinicalNote(\(PythonText.words(text).count) words)" }
}

/// What is known before the first word of a note.
public struct NoteStart: Sendable, Equatable {
    /// Tokens of the prompt.
    public let promptTokens: Int
    /// Turns of the conversation that did not fit.
    public let leftOutTurns: Int
    /// Words left out of turns that by themselves were too long.
    public let leftOutWords: Int

    /// Whether the model reads all of the conversation.
    public var isWhole: Bool { leftOutTurns == 0 && leftOutWords == 0 }
}

/// How a note is written.
public struct NoteOptions: Sendable, Equatable {
    /// How its tokens are chosen, and how many at most.
    public var generation: GenerationOptions
    /// Leave out turns of a conversation that is too long, by the rule of the training; how many is in
    /// `NoteStart`. Otherwise that is an error.
    public var shortens: Bool

    /// Makes options.
    public init(generation: GenerationOptions = .init(), shortens: Bool = true) {
        self.generation = generation
        self.shortens = shortens
    }
}

/// Something that happens while a note is written.
public enum NoteEvent: Sendable, Equatable, CustomStringConvertible {
    /// The prompt is made and reading it begins.
    case started(NoteStart)
    /// A piece of the note; the pieces join to its text.
    case delta(String, NoteSection)
    /// The note, and how it came about; the last event, which only a cancelled reader does not get.
    case finished(ClinicalNote, Completion)

    /// What happened, without the words.
    public var description: String {
        switch self {
        case .started(let start): "started(\(counted(start.promptTokens, "token")))"
        case .delta(let text, _): "delta(\(counted(text.unicodeScalars.count, "character")))"
        case .finished(let note, let completion): "finished(\(note), \(completion))"
        }
    }
}

/// A note while it is written; see `Generation` for its life.
public struct NoteStream: AsyncSequence, Sendable {
    /// Gives the events.
    public struct AsyncIterator: AsyncIteratorProtocol {
        var reader: Writing<NoteEvent, Result>.Reader

        /// The next event; `nil` at the end.
        ///
        /// - Throws: `Phi3Error`.
        public mutating func next() async throws -> NoteEvent? { try await reader.next() }
    }

    /// The note and how it came about.
    public struct Result: Sendable, Equatable, CustomStringConvertible {
        /// The note.
        public let note: ClinicalNote
        /// What the model wrote, and how long it took.
        public let completion: Completion
        /// What of the conversation was read.
        public let start: NoteStart

        /// How long it is, without the words.
        public var description: String { "Result(\(note), \(completion))" }
    }

    private let writing: Writing<NoteEvent, Result>

    init(
        _ write:
            @escaping @Sendable (_ emit: @escaping @Sendable (NoteEvent) -> Void) async throws
            -> Result
    ) {
        writing = Writing { emit in
            let result = try await write(emit)
            emit(.finished(result.note, result.completion))
            return result
        }
    }

    /// Starts reading.
    public func makeAsyncIterator() -> AsyncIterator { AsyncIterator(reader: .init(writing)) }

    /// The finished note, also where it was cancelled: then it is what was written until then.
    ///
    /// - Throws: `Phi3Error`; `CancellationError` where it was cancelled before its turn came.
    public var result: Result {
        get async throws { try await writing.outcome }
    }

    /// Stops the writing after the token it is at; the event `finished` still comes.
    public func cancel() { writing.cancel() }
}

/// The pieces of a note: no white space before its first word, and none behind its last.
struct NoteText {
    private(set) var text = ""
    private var withheld = String.UnicodeScalarView()

    /// Takes a piece and gives out what is surely part of the note.
    mutating func push(_ piece: String) -> String {
        var scalars = piece.unicodeScalars[...]
        if text.isEmpty { scalars = scalars.drop(while: PythonText.isSpace) }
        withheld.append(contentsOf: scalars)
        guard let last = withheld.lastIndex(where: { !PythonText.isSpace($0) }) else { return "" }
        let end = withheld.index(after: last)
        let decided = String(withheld[..<end])
        withheld = String.UnicodeScalarView(withheld[end...])
        text += decided
        return decided
    }
}
