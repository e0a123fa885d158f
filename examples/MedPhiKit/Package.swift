// swift-tools-version: 6.0
import Foundation
import PackageDescription

var products: [Product] = [
    .library(name: "MedPhiKit", targets: ["MedPhiKit"]),
    .executable(name: "medphi-kit", targets: ["medphi-kit"]),
]

var targets: [Target] = [
    .target(name: "Phi3Core"),
    .target(name: "Phi3Reference", dependencies: ["Phi3Core"]),
    .target(name: "Phi3CoreML", dependencies: ["Phi3Core"]),
    .target(name: "MedPhiKit", dependencies: ["Phi3Core", "Phi3Reference", "Phi3CoreML"]),
    .target(name: "MedPhiKitCommand", dependencies: ["MedPhiKit", "Phi3Reference"]),
    .executableTarget(name: "medphi-kit", dependencies: ["MedPhiKitCommand"]),
    .testTarget(name: "Phi3CoreTests", dependencies: ["Phi3Core"]),
    .testTarget(name: "Phi3ReferenceTests", dependencies: ["Phi3Reference"]),
    .testTarget(name: "Phi3CoreMLTests", dependencies: ["Phi3CoreML", "Phi3Reference"]),
    .testTarget(name: "MedPhiKitTests", dependencies: ["MedPhiKit", "MedPhiKitCommand"]),
]

#if os(Linux)
    // Core ML is Apple's. Here a module of its name, which computes with Phi3Reference and checks
    // every call, lets the same runtime be compiled and tested. It is in no product.
    targets.append(.target(name: "CoreML", dependencies: ["Phi3Core", "Phi3Reference"]))
    for target in targets where ["Phi3CoreML", "Phi3CoreMLTests"].contains(target.name) {
        target.dependencies.append("CoreML")
    }
#endif

// Unoptimised, the processor computes so slowly that tests could compare little. Unasked, a package that others
// depend on may not say so for debug builds; this project's own tests ask.
if Context.environment["MEDPHI_OPTIMISE"] == "1" {
    for target in targets where ["Phi3Reference", "CoreML"].contains(target.name) {
        target.swiftSettings = [.unsafeFlags(["-O"])]
    }
    for target in targets where target.name == "MedPhiKitTests" {
        target.swiftSettings = [.define("OPTIMISED")]
    }
}

// Tests read files of the checkout around them; `medphi swift-kit` writes the package without them.
let hasTests = FileManager.default.fileExists(atPath: Context.packageDirectory + "/Tests")
targets.removeAll { $0.type == .test && !hasTests }

let package = Package(
    name: "MedPhiKit",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: products,
    targets: targets,
    swiftLanguageModes: [.v6]
)
