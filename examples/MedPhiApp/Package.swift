// swift-tools-version: 6.0
import Foundation
import PackageDescription

var targets: [Target] = [
    // What the app does, without a window: builds and is tested on Linux too.
    .target(
        name: "MedPhiSession",
        dependencies: [.product(name: "MedPhiKit", package: "MedPhiKit")]),
    .target(name: "MedPhiViews", dependencies: ["MedPhiSession"]),
    .executableTarget(name: "MedPhiApp", dependencies: ["MedPhiViews"]),
    .testTarget(name: "MedPhiSessionTests", dependencies: ["MedPhiSession"]),
]

// Tests read files of the checkout around them; `medphi swift-kit --app` writes the app without.
let hasTests = FileManager.default.fileExists(atPath: Context.packageDirectory + "/Tests")
targets.removeAll { $0.type == .test && !hasTests }

let package = Package(
    name: "MedPhiApp",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [
        .executable(name: "MedPhiApp", targets: ["MedPhiApp"]),
        .library(name: "MedPhiViews", targets: ["MedPhiViews", "MedPhiSession"]),
    ],
    dependencies: [.package(path: "../MedPhiKit")],
    targets: targets,
    swiftLanguageModes: [.v6]
)
