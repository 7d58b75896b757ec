// Package safefs works on files below a directory that other users may change meanwhile. These users can't make it work
// on files outside of that directory:
//
//   - Place is a directory that is held open. It was reached through no symbolic link that an untrusted user could have
//     put there. PlaceOptions says whose directories may lead to it.
//   - Dirs opens, makes and removes the files of one tree, and follows no symbolic link on the way.
//   - RemoveTree removes a tree, follows no symbolic link, and crosses no mount point.
//
// It knows neither releases nor archives. What must outlast a power cut is written by package durable.
package safefs
