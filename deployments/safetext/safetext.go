// Package safetext makes text from untrusted sources fit to be shown in logs, errors and JSON. It hides what may be
// secret in URLs, bounds lengths, and replaces characters that control a terminal or reorder a line.
package safetext

import (
	"fmt"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// MaxValue bounds a value in a log line, in bytes.
const MaxValue = 4 << 10

// maxRawURL bounds how far beyond its :// the password of a URL that doesn't parse is looked for, in bytes.
const maxRawURL = 1 << 10

// digestMark is what a pointer has between its URL and the digest's digits.
const digestMark = "@sha256:"

// hiddenText replaces a secret.
const hiddenText = "…"

// Clean returns s for a log line: printable, without secrets in its URLs, and cut to about MaxValue bytes. A cut text
// ends with the number of bytes that were left out.
func Clean(s string) string {
	more := 0
	if len(s) > 2*MaxValue {
		s, more = s[:2*MaxValue], len(s)-2*MaxValue // bounds the work below
	}
	s = Printable(URLs(s))
	kept := Prefix(s, MaxValue)
	if more += len(s) - len(kept); more == 0 {
		return s
	}
	return kept + fmt.Sprintf("… [%d more bytes]", more)
}

// Clip returns s if it is no longer than most bytes. If it is longer, Clip returns the beginning of s, of up to most
// bytes, followed by a note of how many bytes were left out.
func Clip(s string, most int) string {
	if len(s) <= most {
		return s
	}
	cut := most
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + fmt.Sprintf("… [%d more bytes]", len(s)-cut)
}

// Prefix returns s if it is no longer than most bytes. If it is longer, Prefix returns the whole characters within its
// first most bytes. most must not be negative.
func Prefix(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "")
}

// Cut returns s if it is no longer than most bytes. If it is longer, Cut returns the beginning of s
// and "...", together no longer than most bytes. most must be at least 3.
func Cut(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return Prefix(s, most-len("...")) + "..."
}

// Printable returns s with U+FFFD in place of invalid UTF-8, and of characters that reorder or hide text. Control
// characters are replaced too, except tabs and line ends.
func Printable(s string) string {
	if strings.IndexFunc(s, hostile) < 0 && utf8.ValidString(s) {
		return s
	}
	return strings.Map(func(r rune) rune {
		if hostile(r) {
			return utf8.RuneError
		}
		return r
	}, s)
}

// Line returns s on one line, cut as by Cut to no more than most bytes. Control characters become spaces, and invalid
// UTF-8 becomes "?".
func Line(s string, most int) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	return Cut(s, most)
}

func hostile(r rune) bool {
	return r != '\n' && r != '\t' && isInvisible(r)
}

// isInvisible reports whether a character has no glyph of its own: controls, and formats such as those that change the
// direction of writing.
func isInvisible(r rune) bool {
	return unicode.IsControl(r) || unicode.In(r, unicode.Cf, unicode.Noncharacter_Code_Point) || r == '\u2028' ||
		r == '\u2029'
}

// JSON escapes the invisible characters that may stand in the strings of a JSON text, without changing its meaning.
func JSON(data []byte) []byte {
	s := string(data)
	odd := func(r rune) bool { return r >= 0x7f && isInvisible(r) }
	if strings.IndexFunc(s, odd) < 0 {
		return data
	}
	out := make([]byte, 0, len(s)+64)
	for _, r := range s {
		switch {
		case !odd(r):
			out = utf8.AppendRune(out, r)
		case r > 0xffff:
			high, low := utf16.EncodeRune(r)
			out = fmt.Appendf(out, `\u%04x\u%04x`, high, low)
		default:
			out = fmt.Appendf(out, `\u%04x`, r)
		}
	}
	return out
}

// URLs returns s with the secrets hidden in all of its URLs. These are the user name and password, and the values of
// parameters, in the query or the fragment, that may be a signature, a token or a key. Passwords are hidden in many a
// URL that doesn't parse, too: with / ? # or a space in the password, or without a part of ://.
func URLs(s string) string {
	if strings.Contains(s, "invalid port ") {
		s = invalidPort.ReplaceAllString(s, "parse a URL: invalid port after host")
	}
	return hideURLs(s, false)
}

// URLsInMarkup is URLs for a text of HTML or JSON, which stays one: nothing is hidden beyond a quote or an angle
// bracket, so that what one report says hides nothing of another's.
func URLsInMarkup(s string) string { return hideURLs(s, true) }

func hideURLs(s string, markup bool) string {
	s = brokenURLs(s)
	var out strings.Builder
	for {
		i := strings.Index(s, "://")
		if i < 0 {
			out.WriteString(s)
			return out.String()
		}
		out.WriteString(s[:i+3])
		s = s[i+3:]
		if i := rawPassword(s, markup); i > 0 {
			out.WriteString(hiddenText + "@")
			s = strings.TrimPrefix(strings.TrimPrefix(s[i:], "@"), "%40")
		}
		end := urlLength(s)
		out.WriteString(redact(s[:end]))
		s = s[end:]
	}
}

var (
	// invalidPort matches what url.Parse says of a password with a character that should have been escaped.
	invalidPort = regexp.MustCompile(`parse \\*".*?: invalid port .*? after host`)
	// brokenScheme matches a URL with a password whose :// lacks something.
	brokenScheme = regexp.MustCompile(`(?i)(\b(?:https?|ssh|git|s3|gs)(?::/?|//?))[^\s/@:"]+:[^\s"]*@[^\s"]*`)
)

// brokenURLs does the work of URLs for those whose :// lacks something. Pages are long, and the expression is slow: it
// sees only the words that may match.
func brokenURLs(s string) string {
	if !strings.Contains(s, "@") {
		return s
	}
	const delimiters = " \t\n\"'`<>"
	var out strings.Builder
	for {
		at := strings.IndexByte(s, '@')
		if at < 0 {
			out.WriteString(s)
			return out.String()
		}
		begin, end := strings.LastIndexAny(s[:at], delimiters)+1, len(s)
		if i := strings.IndexAny(s[at:], delimiters); i >= 0 {
			end = at + i
		}
		word := s[begin:end]
		if strings.Contains(word, ":") && !strings.Contains(word, "://") {
			word = brokenScheme.ReplaceAllStringFunc(word, func(match string) string {
				rest := match[len(brokenScheme.FindStringSubmatch(match)[1]):]
				if i := lastAt(strings.TrimSuffix(rest, pointersDigest(rest))); i >= 0 {
					return match[:len(match)-len(rest)] + hiddenText + rest[i:]
				}
				return match
			})
		}
		out.WriteString(s[:begin])
		out.WriteString(word)
		s = s[end:]
	}
}

// urlLength returns the length of the URL, or of the rest of one, that s begins with.
func urlLength(s string) int {
	end := strings.IndexFunc(s, func(r rune) bool { return unicode.IsSpace(r) || strings.ContainsRune("\"'`<>\\|", r) })
	if end < 0 {
		return len(s)
	}
	return end
}

// rawPassword returns the length of a user name and a password, in the text s after ://, if the password has a
// character that should have been escaped. What seems to be the port is the beginning of such a password. It returns 0
// if s has none. In markup the password ends with the URL, elsewhere a space or a quote may be a part of it.
func rawPassword(s string, markup bool) int {
	end := urlLength(s)
	authority := s[:end]
	if i := strings.IndexAny(authority, "/?#"); i >= 0 {
		authority = authority[:i]
	}
	_, port, found := strings.Cut(authority, ":")
	near := s[:min(len(s), maxRawURL)]
	switch {
	case !found, strings.HasPrefix(s, "["), lastAt(authority) >= 0, strings.Trim(port, "0123456789") == "",
		!strings.Contains(near, "@") && !strings.Contains(near, "%40"):
		return 0
	}
	parts := []string{s[:end]}
	if line, _, _ := strings.Cut(near, "\n"); !markup {
		parts = append(parts, line)
	}
	for _, part := range parts {
		i := lastAt(part)
		for i >= 0 && strings.HasPrefix(part[i:], digestMark) { // the digest may be cut
			i = lastAt(part[:i])
		}
		if i >= 0 {
			return i
		}
	}
	return 0
}

// lastAt returns the index of the last @ in s, also of an escaped one; -1: there is none.
func lastAt(s string) int { return max(strings.LastIndexByte(s, '@'), strings.LastIndex(s, "%40")) }

// redact does the work of URLs for a URL's text after "://".
func redact(rest string) string {
	authority := len(rest)
	if i := strings.IndexAny(rest, "/?#"); i >= 0 {
		authority = i
	}
	if i := lastAt(rest[:authority]); i >= 0 {
		rest = hiddenText + rest[i:]
	}
	i := strings.IndexAny(rest, "?#")
	if i < 0 {
		return rest
	}
	digest := pointersDigest(rest[i:])
	return rest[:i] + parameters(rest[i:len(rest)-len(digest)]) + digest
}

// parameters hides the values of secret parameters in a text that begins with ? or #.
func parameters(s string) string {
	var out strings.Builder
	for s != "" {
		end := len(s)
		if i := strings.IndexAny(s[1:], "&;"); i >= 0 {
			end = i + 1
		}
		name, value, found := strings.Cut(s[:end], "=")
		switch i := strings.IndexByte(value, '#'); {
		case found && secretParameter(name):
			value = hiddenText
		case i >= 0:
			value = value[:i] + parameters(value[i:])
		}
		out.WriteString(name)
		if found {
			out.WriteString("=" + value)
		}
		s = s[end:]
	}
	return out.String()
}

// pointersDigest returns the @sha256:HEX at the end of a pointer, which is no secret; empty: there is none.
func pointersDigest(s string) string {
	const length = 64
	i := len(s) - len(digestMark) - length
	if i < 0 || !strings.HasPrefix(s[i:], digestMark) || strings.Trim(s[i+len(digestMark):], "0123456789abcdef") != "" {
		return ""
	}
	return s[i:]
}

func secretParameter(name string) bool {
	name = strings.ToLower(name)
	for _, part := range []string{"sig", "token", "secret", "pass", "pwd", "key", "credential", "auth", "code", "session", "%"} {
		if strings.Contains(name, part) {
			return true
		}
	}
	return false
}
