/// The part of the manifest that describes the package, its architecture and its weights.
extension Manifest {
    /// An input, output or state of a function.
    public struct TensorFacts: Sendable, Equatable {
        /// The kinds of numbers that cross the package's border.
        public enum Kind: String, Sendable, CaseIterable {
            /// Whole numbers of 32 bits.
            case int32
            /// Half precision.
            case float16
            /// Single precision.
            case float32
        }

        /// Its name, e.g. "inputIds".
        public var name: String
        /// Its extents.
        public var shape: [Int]
        /// The kind of its numbers.
        public var type: Kind
    }

    /// What one function takes, gives and keeps.
    public struct Signature: Sendable, Equatable {
        /// What it takes.
        public var inputs: [TensorFacts]
        /// What it gives.
        public var outputs: [TensorFacts]
        /// What it keeps between calls.
        public var states: [TensorFacts]
    }

    /// How the package is called.
    public struct CoreMLFacts: Sendable, Equatable {
        /// Units that Core ML can be asked for.
        public enum Units: String, Sendable, CaseIterable {
            /// Processor and graphics.
            case cpuAndGPU = "cpu_and_gpu"
            /// Processor and Neural Engine.
            case cpuAndNeuralEngine = "cpu_and_neural_engine"
            /// Processor alone.
            case cpuOnly = "cpu_only"
            /// Whatever Core ML chooses.
            case all
        }

        /// The functions by name.
        public var functions: [String: Signature]
        /// The one that a load without a name gives.
        public var defaultFunction: String
        /// Tokens of the context.
        public var contextLength: Int
        /// Tokens that one prefill call reads.
        public var prefillWidth: Int
        /// What the mask adds to hide a key.
        public var maskValue: Double
        /// Which units to ask for.
        public var recommendedUnits: Units
        /// On which it has run so far.
        public var triedUnits: [String]
        /// "ios" and "macos" -> the oldest version.
        public var minOS: [String: String]
    }

    /// Rotary positions. LongRoPE takes its short factors up to `switchLength` tokens, beyond it the
    /// long ones for all of the sequence; a package that reaches further has both, chosen by the
    /// input `ropeRow`.
    public struct RopeFacts: Sendable, Equatable {
        /// Plain or LongRoPE.
        public enum Kind: String, Sendable, CaseIterable {
            /// Plain rotary positions.
            case plain = "default"
            /// Two sets of factors.
            case longrope
        }

        /// The sets of factors in the package.
        public enum Factors: String, Sendable, CaseIterable {
            /// None, for plain rotary positions.
            case none
            /// The short set.
            case short
            /// Both sets.
            case both
        }

        /// Plain or LongRoPE.
        public var kind: Kind
        /// The base of the wavelengths.
        public var theta: Double
        /// The sets of factors in the package.
        public var factors: Factors
        /// What queries and keys are stretched by.
        public var attentionFactor: Double
        /// How many of a head's numbers turn.
        public var rotarySize: Int
        /// Tokens beyond which the long factors apply; `nil` without LongRoPE.
        public var switchLength: Int?
    }

    /// The architecture.
    public struct ModelFacts: Sendable, Equatable {
        /// Rows of the embedding.
        public var vocabSize: Int
        /// Width of the residual stream.
        public var hiddenSize: Int
        /// Width inside the feed-forward layers.
        public var intermediateSize: Int
        /// Blocks.
        public var layers: Int
        /// Query heads.
        public var heads: Int
        /// Key and value heads.
        public var kvHeads: Int
        /// Width of a head.
        public var headSize: Int
        /// What is added to a mean square before its root.
        public var epsilon: Double
        /// Tokens the model was made for.
        public var maxPositions: Int
        /// How many keys a query sees; `nil`: all.
        public var slidingWindow: Int?
        /// Whether the head's weight is the embedding's.
        public var tiedEmbeddings: Bool
        /// Rotary positions.
        public var rope: RopeFacts
    }

    /// How one matrix is stored.
    public struct StoredFacts: Sendable, Equatable {
        /// Bits per weight.
        public var bits: Int
        /// Inputs per scale; `nil` for half precision.
        public var group: Int?
    }

    /// How the weights are stored.
    public struct QuantizationFacts: Sendable, Equatable {
        /// Where the codes come from.
        public enum Origin: String, Sendable, CaseIterable {
            /// The base's own.
            case mlx
            /// Made by the export.
            case exported
            /// None: half precision.
            case none
        }

        /// What a scale belongs to.
        public enum Scheme: String, Sendable, CaseIterable {
            /// A group of inputs.
            case block
            /// A row.
            case channel
        }

        /// What most layers subtract from a code.
        public enum Offset: String, Sendable, CaseIterable {
            /// A whole number.
            case integer
            /// A half-precision number.
            case float16
            /// Nothing.
            case none
        }

        /// Where the codes come from.
        public var source: Origin
        /// What a scale belongs to.
        public var scheme: Scheme
        /// Bits of the projections.
        public var bits: Int
        /// Their inputs per scale; `nil` for half precision.
        public var group: Int?
        /// What most layers subtract.
        public var offset: Offset
        /// The embedding.
        public var embedding: StoredFacts
        /// The output head.
        public var head: StoredFacts
        /// Layer -> form of those that are stored otherwise.
        public var exceptions: [String: String]
        /// The largest difference from what MLX computes with; `nil` where nothing is quantised.
        public var error: Double?
        /// Scales too small for a normal half-precision number.
        public var subnormalScales: Int
    }

    /// Bytes that the model needs.
    public struct MemoryFacts: Sendable, Equatable {
        /// All weights.
        public var weights: Int
        /// Keys and values of one token.
        public var kvPerToken: Int
        /// Keys and values of the whole context.
        public var kv: Int
        /// Adapter slots.
        public var adapterSlots: Int
        /// All of it together, as predicted.
        public var resident: Int
    }
}
