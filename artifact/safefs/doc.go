// Package safefs works on files below a directory that others may change meanwhile. They can't lead it out of there:
//
//   - Place is a directory that is held open. It was reached through no symbolic link that an untrusted user could have
//     put there. PlaceOptions says whose directories may lead to it.
//   - Dirs opens, makes and removes the files of one tree, and follows no symbolic link on the way.
//   - RemoveTree removes a tree, follows no symbolic link, and crosses no mount point.
//
// It knows neither releases nor archives. What must outlast a power cut is written by package durable.
package safefs
