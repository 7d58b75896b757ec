// Package artifact publishes, fetches and keeps releases: trees of files. In object storage, each lies as one archive,
// and on a node as one directory. Package archive has the formats of archive, index and delta.
//
// # Fetching
//
// With strategy release, a node first takes what it can from the release that it runs, hashed unless it is known to be
// unchanged. The rest comes from a delta, if one was published for that release. What that lacks comes from the
// archive, in spans of up to 8 MiB, which bridge gaps of up to 128 KiB, on eight connections. Frames are hashed before
// they are decoded, and files written by as many workers as there are cores, straight into a private directory. Every
// 64 MiB the file system is synced in the background: the sync before the switch, which alone counts, then has little
// left to do. There is no journal: a fetch that was cut finds what it has by hashing it, files whole, large ones by
// frame. With the other strategies, it starts again. A delta of more than 4 MiB is fetched after the index, once it is
// known that the disk holds it beside the tree. If cut, it is resumed, and read once its hash is right.
//
// An archive without an index is unpacked as it comes, and nothing is kept of the stream. If this was killed, or the
// storage went away, the next try fetches archives of 16 MiB or more to a file beside the tree. Each further try goes
// on where that ended. The object must have the ETag of before, its server keep to Range, and the disk have room for
// archive and tree. Otherwise the archive is streamed again. The file is unpacked once all of it has the manifest's
// checksum. It is removed when the release is whole or refused, or another archive is fetched like this.
//
// If the node's configuration names mirrors, each object is asked for there first. What comes is used only if its hash
// is right, so any place may give it. An archive whose checksum is shorter than SHA-256 is read only from its own URL.
//
// A file made of frames is not hashed a second time: the index names each frame, and a frame decodes to one thing. That
// this is the content whose hash the index gives the file is up to who packed it: publish takes both from the same
// bytes. An index that says two things was pinned as it is, and verifying the release names the file.
//
// Memory: some 60 MiB whatever the archive's size, and 0.3 KiB for each entry of the tree. Seen at most, with GOGC=50
// as in the agent: 68 MB for 44,567 files of 563 MB, 111 MB for 178,268 files of 2,252 MB.
package artifact
