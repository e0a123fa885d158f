/// A JSON value exactly as it stands in a file.
///
/// Object members keep their order and every scalar of their names, a U+FEFF included. Whole numbers
/// that fit 64 bits stay whole; other numbers are `number`. What is no JSON, comes twice in an
/// object, or is a number without a finite value is an error and never a guess.
public indirect enum JSONValue: Sendable, Equatable {
    /// `null`.
    case null
    /// `true` or `false`.
    case bool(Bool)
    /// A number without fraction and exponent that fits 64 bits.
    case integer(Int)
    /// Any other finite number.
    case number(Double)
    /// Text.
    case string(String)
    /// A list.
    case array([JSONValue])
    /// An object.
    case object(JSONObject)

    /// The members of an object; `nil` for everything else.
    public var object: JSONObject? {
        if case .object(let value) = self { return value }
        return nil
    }

    /// The items of a list; `nil` for everything else.
    public var array: [JSONValue]? {
        if case .array(let value) = self { return value }
        return nil
    }

    /// The text of a string; `nil` for everything else.
    public var string: String? {
        if case .string(let value) = self { return value }
        return nil
    }

    /// A whole number; `nil` for everything else, numbers with a fraction included.
    public var integer: Int? {
        if case .integer(let value) = self { return value }
        return nil
    }

    /// Any number as a floating-point one; `nil` for everything else.
    public var double: Double? {
        switch self {
        case .integer(let value): return Double(value)
        case .number(let value): return value
        default: return nil
        }
    }

    /// True or false; `nil` for everything else.
    public var bool: Bool? {
        if case .bool(let value) = self { return value }
        return nil
    }

    /// Whether this is `null`.
    public var isNull: Bool { self == .null }

    /// Whether Python would take the value for true: not null, false, zero, or empty.
    var isTruthy: Bool {
        switch self {
        case .null: return false
        case .bool(let value): return value
        case .integer(let value): return value != 0
        case .number(let value): return value != 0
        case .string(let value): return !value.isEmpty
        case .array(let value): return !value.isEmpty
        case .object(let value): return !value.isEmpty
        }
    }

    /// The value of a member, where this is an object that has it.
    public subscript(name: String) -> JSONValue? { object?[name] }

    /// A short form for messages: lists and objects by their size, texts cut after forty characters.
    public var shown: String {
        switch self {
        case .null: return "null"
        case .bool(let value): return String(value)
        case .integer(let value): return String(value)
        case .number(let value): return "\(value)"
        case .string(let value): return "'\(printable(value, limit: 40))'"
        case .array(let value): return "a list of \(value.count)"
        case .object(let value): return "an object of \(value.count)"
        }
    }
}

/// The members of a JSON object, in their order in the file.
public struct JSONObject: Sendable, Equatable, Sequence, ExpressibleByDictionaryLiteral {
    /// Names and values, in order.
    public private(set) var members: [(name: String, value: JSONValue)]
    private var places: [ScalarKey: Int]

    /// An object without members.
    public init() {
        members = []
        places = [:]
    }

    /// An object from a literal; of equal names the last counts.
    public init(dictionaryLiteral elements: (String, JSONValue)...) {
        self.init()
        for (name, value) in elements { self[name] = value }
    }

    /// The value of a member. Names are compared scalar by scalar: U+1F71 is not U+03AC.
    public subscript(name: String) -> JSONValue? {
        get { places[ScalarKey(name)].map { members[$0].value } }
        set {
            let key = ScalarKey(name)
            if let place = places[key] {
                if let newValue {
                    members[place].value = newValue
                } else {
                    self = JSONObject(members.filter { ScalarKey($0.name) != key })
                }
            } else if let newValue {
                places[key] = members.count
                members.append((name, newValue))
            }
        }
    }

    /// An object from members; of equal names the last counts.
    public init(_ members: some Sequence<(name: String, value: JSONValue)>) {
        self.init()
        for member in members { self[member.name] = member.value }
    }

    /// How many members there are.
    public var count: Int { members.count }
    /// Whether there are none.
    public var isEmpty: Bool { members.isEmpty }
    /// The names, in order.
    public var names: [String] { members.map(\.name) }

    /// An iterator over the members.
    public func makeIterator() -> IndexingIterator<[(name: String, value: JSONValue)]> {
        members.makeIterator()
    }

    /// Whether both have the same members in the same order.
    public static func == (left: JSONObject, right: JSONObject) -> Bool {
        left.count == right.count
            && zip(left, right).allSatisfy {
                ScalarKey($0.name) == ScalarKey($1.name) && $0.value == $1.value
            }
    }
}

/// Text compared by its bytes: Swift's own comparison takes canonically equivalent names for one.
struct ScalarKey: Hashable, Sendable {
    let text: String

    init(_ text: String) { self.text = text }

    static func == (left: ScalarKey, right: ScalarKey) -> Bool {
        left.text.utf8.elementsEqual(right.text.utf8)
    }

    func hash(into hasher: inout Hasher) {
        var copy = text
        copy.withUTF8 { hasher.combine(bytes: UnsafeRawBufferPointer($0)) }
    }
}

/// Text for messages: controls and other invisible scalars escaped, cut after `limit` characters.
func printable(_ text: String, limit: Int = 60) -> String {
    var shown = ""
    for scalar in text.unicodeScalars.prefix(limit) {
        if isPrintable(scalar) {
            shown.unicodeScalars.append(scalar)
        } else {
            shown += "\\u{\(String(scalar.value, radix: 16))}"
        }
    }
    return text.unicodeScalars.count > limit ? shown + "…" : shown
}

/// Whether a scalar shows something, as Python's `str.isprintable` sees it.
func isPrintable(_ scalar: Unicode.Scalar) -> Bool {
    if scalar == " " { return true }
    switch scalar.properties.generalCategory {
    case .control, .format, .surrogate, .privateUse, .unassigned, .lineSeparator,
        .paragraphSeparator, .spaceSeparator:
        return false
    default:
        return true
    }
}
