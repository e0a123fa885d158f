/// How a text is written.
public struct GenerationOptions: Sendable, Equatable {
    /// How tokens are chosen; the usual is the most likely one each time.
    public var sampling: SamplingOptions
    /// The longest text, in tokens; `nil`: 512, and of a note at most half of the context.
    public var maxTokens: Int?
    /// Strings that end the text; they are not part of it.
    public var stopStrings: [String]

    /// Makes options; they are checked when a generation begins.
    public init(
        sampling: SamplingOptions = .init(), maxTokens: Int? = nil, stopStrings: [String] = []
    ) {
        self.sampling = sampling
        self.maxTokens = maxTokens
        self.stopStrings = stopStrings
    }

    /// The longest text where nothing is said.
    public static let usualMaxTokens = 512

    /// - Throws: `Phi3Error.option` for the first value outside its range.
    public func validate() throws(Phi3Error) {
        try sampling.validate()
        _ = try StopFilter(stopStrings)
        if let maxTokens, maxTokens < 1 {
            throw .option(
                ErrorDetails(
                    place: "maxTokens", found: "\(maxTokens)", expected: "1 or more",
                    advice: "Choose a value in range."))
        }
    }
}

/// What the model is to go on from.
public enum Prompt: Sendable, Equatable, CustomStringConvertible {
    /// A chat, in which words that look like a token stay words.
    case messages([ChatMessage])
    /// Ids as they are.
    case ids([Int32])

    /// One message of a user.
    public static func user(_ text: String) -> Prompt {
        .messages([ChatMessage(role: .user, content: text)])
    }

    /// How long it is, without the words.
    public var description: String {
        switch self {
        case .messages(let messages): "Prompt(\(counted(messages.count, "message")))"
        case .ids(let ids): "Prompt(\(counted(ids.count, "id")))"
        }
    }
}

/// A piece of text that is decided.
public struct Delta: Sendable, Equatable, CustomStringConvertible {
    /// The text; empty while a character or a stop string is not decided.
    public var text: String
    /// The ids written since the delta before.
    public var ids: [Int32]

    /// Makes a piece.
    public init(text: String, ids: [Int32]) {
        self.text = text
        self.ids = ids
    }

    /// How long it is, without the words.
    public var description: String {
        "Delta(\(counted(text.unicodeScalars.count, "character")), \(counted(ids.count, "id")))"
    }
}

/// Why a text ended.
public enum StopReason: Sendable, Equatable {
    /// The model ended it.
    case endOfTurn
    /// One of the stop strings came.
    case stopString(String)
    /// It has as many tokens as were allowed.
    case maxTokens
    /// The context has no room for more.
    case contextFull
    /// Its task was cancelled; the text so far is whole characters.
    case cancelled
}

/// How long it took and what it needed.
public struct Timings: Sendable, Equatable {
    /// Seconds until the first token was chosen.
    public var timeToFirstToken: Double
    /// Seconds that reading the prompt took.
    public var prefill: Double
    /// Seconds from the first token to the last.
    public var decode: Double
    /// Tokens of the prompt per second, those that were in memory already included.
    public var prefillTokensPerSecond: Double
    /// Tokens after the first per second; 0 with fewer than two.
    public var decodeTokensPerSecond: Double
    /// The most bytes the process has had in memory so far; `nil`: the system does not say.
    public var peakBytes: Int?

    init(prompt: Int, written: Int, prefill: Duration, first: Duration, whole: Duration) {
        func rate(_ count: Int, _ seconds: Double) -> Double {
            count > 0 && seconds > 0 ? Double(count) / seconds : 0
        }
        timeToFirstToken = first.seconds
        self.prefill = prefill.seconds
        decode = max(0, whole.seconds - first.seconds)
        prefillTokensPerSecond = rate(prompt, self.prefill)
        decodeTokensPerSecond = rate(written - 1, decode)
        peakBytes = SystemMemory.peak()
    }
}

/// A text that is finished.
public struct Completion: Sendable, Equatable, CustomStringConvertible {
    /// The text.
    public var text: String
    /// Its ids, without the one that ended it.
    public var ids: [Int32]
    /// Tokens of the prompt.
    public var promptTokens: Int
    /// Why it ended.
    public var stopReason: StopReason
    /// How long it took.
    public var timings: Timings

    /// How long it is and why it ended, without the words.
    public var description: String {
        let end = if case .stopString = stopReason { "stop string" } else { "\(stopReason)" }
        return "Completion(\(counted(ids.count, "token")), \(end))"
    }
}
