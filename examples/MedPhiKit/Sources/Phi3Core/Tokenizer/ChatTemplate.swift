/// Who a message of a chat is from.
public enum ChatRole: String, Sendable, Codable, CaseIterable {
    /// Instructions before the first message.
    case system
    /// The one who asks.
    case user
    /// The model.
    case assistant

    /// The token that opens a message of this role, as `<|user|>`.
    public var token: String { "<|\(rawValue)|>" }
}

/// One message of a chat.
public struct ChatMessage: Sendable, Equatable, Codable, CustomStringConvertible {
    /// Who it is from.
    public var role: ChatRole
    /// Its text. Words in it that look like a token, as `<|end|>`, stay words.
    public var content: String

    /// Makes a message.
    public init(role: ChatRole, content: String) {
        self.role = role
        self.content = content
    }

    /// Who it is from and how long it is, without the words.
    public var description: String {
        "ChatMessage(\(role.rawValue), \(PythonText.words(content).count) words)"
    }
}

/// The structure of a Phi-3 chat: what Phi-3's published templates differ in.
///
/// There is no Jinja engine here. `init(parsing:bosToken:eosToken:)` reads the structure from a
/// checkpoint's template and refuses one it could not reproduce; a bundle's manifest says it
/// outright.
public struct ChatTemplate: Sendable, Equatable {
    /// The token before the first message, or nothing.
    public var opening: String
    /// The token after the last message of a finished chat, or nothing.
    public var closing: String
    /// Text between a role token and the message, a line break in Phi-3.
    public var afterRole: String
    /// Text behind `<|end|>`, a line break in Phi-3.
    public var afterEnd: String
    /// Whether system messages are written at all.
    public var knowsSystem: Bool
    /// Whether an empty system message is left out, as Phi-3.5 does.
    public var skipsEmptySystem: Bool

    /// The token behind every message.
    public static let end = "<|end|>"
    /// The token behind a finished text.
    public static let endOfText = "<|endoftext|>"

    /// The structure of Phi-3-mini's template of July 2024, and any other.
    public init(
        opening: String = "", closing: String = ChatTemplate.endOfText, afterRole: String = "\n",
        afterEnd: String = "\n", knowsSystem: Bool = true, skipsEmptySystem: Bool = false
    ) {
        self.opening = opening
        self.closing = closing
        self.afterRole = afterRole
        self.afterEnd = afterEnd
        self.knowsSystem = knowsSystem
        self.skipsEmptySystem = skipsEmptySystem
    }

    /// A part of a rendered chat: one added token when `isToken`, plain text otherwise.
    struct Piece: Sendable, Equatable {
        let text: String
        let isToken: Bool
    }

    /// A chat as its parts.
    ///
    /// - Parameter generation: end in `<|assistant|>`, for the model to go on, not in the closing
    ///   token.
    /// - Throws: `Phi3Error.input` for a role the template cannot write.
    func pieces(_ messages: [ChatMessage], generation: Bool) throws(Phi3Error) -> [Piece] {
        var out = [Piece(text: opening, isToken: true)]
        for message in messages {
            if message.role == .system {
                if !knowsSystem { throw ChatTemplate.noSystem }
                if message.content.isEmpty && skipsEmptySystem { continue }
            }
            out += [
                Piece(text: message.role.token, isToken: true),
                Piece(text: afterRole, isToken: false),
                Piece(text: message.content, isToken: false),
                Piece(text: ChatTemplate.end, isToken: true),
                Piece(text: afterEnd, isToken: false),
            ]
        }
        if generation {
            out.append(Piece(text: ChatRole.assistant.token, isToken: true))
            out.append(Piece(text: afterRole, isToken: false))
        } else {
            out.append(Piece(text: closing, isToken: true))
        }
        return out.filter { !$0.text.isEmpty }
    }

    private static let noSystem = Phi3Error.input(
        ErrorDetails(
            place: "a chat", found: "a message has the role 'system'",
            expected: "assistant or user, which is all this checkpoint's chat template writes",
            advice: "Put the text into a user message."))
}
