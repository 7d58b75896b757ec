package deployments

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"kedge/deployments/safetext"
)

// Digest is a SHA-256.
type Digest [32]byte

// ErrDigest means that bytes differ from those that a pointer, manifest or index names. Trying again does not help.
var ErrDigest = errors.New("wrong digest")

// DigestOf returns the SHA-256 of data.
func DigestOf(data []byte) Digest { return sha256.Sum256(data) }

// ParseDigest reads 64 hexadecimal digits, of either case.
func ParseDigest(s string) (Digest, error) {
	var d Digest
	if len(s) != 2*len(d) {
		return d, fmt.Errorf("a SHA-256 has 64 hexadecimal digits, this text has %d bytes", len(s))
	}
	if _, err := hex.Decode(d[:], []byte(s)); err != nil {
		return Digest{}, fmt.Errorf("a SHA-256 has 64 hexadecimal digits: %w", err)
	}
	return d, nil
}

// String returns 64 lower-case hexadecimal digits.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// Short returns the first 12 digits: enough to tell releases apart in a table or a directory's name.
func (d Digest) Short() string { return d.String()[:12] }

// IsZero reports whether d was never set.
func (d Digest) IsZero() bool { return d == Digest{} }

func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

func (d *Digest) UnmarshalText(text []byte) (err error) {
	*d, err = ParseDigest(string(text))
	return err
}

// Pointer names one release for ever: a manifest's URL and the SHA-256 of the manifest's bytes.
// Its text is URL@sha256:HEX, the same in Git, in KV, in pins and on the command line.
type Pointer struct {
	URL    string
	Digest Digest
}

// MaxPointer bounds a pointer's text, in bytes.
const MaxPointer = 2048

const digestMark = "@sha256:"

// ParsePointer parses URL@sha256:HEX. It ignores what Trim removes, which `consul kv put` and editors leave behind.
// The error names anything else that is wrong.
func ParsePointer(text string) (Pointer, error) {
	s := Trim(text)
	switch {
	case s == "":
		return Pointer{}, fmt.Errorf("the pointer is empty: want URL@sha256:HEX, as kedge publish prints it")
	case len(s) > MaxPointer:
		return Pointer{}, fmt.Errorf("the pointer has %d bytes, at most %d are allowed", len(s), MaxPointer)
	}
	i := strings.LastIndex(s, digestMark)
	if i < 0 {
		return Pointer{}, fmt.Errorf(
			"pointer %q does not end in @sha256:HEX: a URL alone could change under the nodes",
			clip(ShownURL(s)),
		)
	}
	digest, err := ParseDigest(s[i+len(digestMark):])
	if err != nil {
		return Pointer{}, fmt.Errorf("pointer %q: %w", clip(ShownURL(s)), err)
	}
	if err := CheckURL(s[:i]); err != nil {
		return Pointer{}, fmt.Errorf("pointer %q: %w", clip(ShownURL(s)), err)
	}
	return Pointer{URL: s[:i], Digest: digest}, nil
}

// PlainURL returns a URL as kedge writes it: with spaces escaped, and without localhost in file://. People, and
// stretcher's manifests, also write plain spaces and file://localhost/.
func PlainURL(s string) string {
	s = strings.ReplaceAll(s, " ", "%20")
	if path, ok := strings.CutPrefix(s, "file://localhost/"); ok {
		s = "file:///" + path
	}
	return s
}

// CheckURL accepts the URLs that anybody may name: s3://BUCKET/KEY, gs://BUCKET/KEY, https://HOST/PATH, file:///PATH,
// and http:// to localhost or a loopback address. It refuses user names, passwords, fragments and white space, as URLs
// are shown in logs and stored in KV. Only http and https may have a query, and s3 a versionId.
func CheckURL(s string) error {
	if err := CheckSourceURL(s); err != nil {
		return err
	}
	if IsPlainHTTP(s) {
		return errors.New("plain http is accepted from this machine only: use https://")
	}
	return nil
}

// IsPlainHTTP reports whether a URL has the scheme http and a host other than localhost or a loopback
// address, so that anybody on the way can change the answer. It looks up no name.
func IsPlainHTTP(s string) bool {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" {
		return false
	}
	ip, err := netip.ParseAddr(u.Hostname())
	return u.Hostname() != "localhost" && (err != nil || !ip.IsLoopback())
}

// IsLocalURL reports whether a URL's host is localhost, ends in .localhost, or is an address that is local by
// IsLocalAddress. It looks up no other name.
func IsLocalURL(u *url.URL) bool {
	host := strings.ToLower(strings.TrimSuffix(u.Hostname(), "."))
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && IsLocalAddress(ip)
}

// IsLocalAddress reports whether an address is loopback, unspecified, link-local, or among cloudLocal. It is then this
// machine's own, or serves its link alone, as clouds serve an instance's credentials. An IPv4 address also counts if
// it is mapped to IPv6 or lies in nat64.
func IsLocalAddress(ip netip.Addr) bool {
	ip = ip.Unmap().WithZone("")
	if b := ip.As16(); nat64.Contains(ip) {
		ip = netip.AddrFrom4([4]byte(b[12:]))
	}
	return ip.IsLoopback() || ip.IsUnspecified() || ip.IsLinkLocalUnicast() || ip.IsLinkLocalMulticast() ||
		slices.ContainsFunc(cloudLocal, func(p netip.Prefix) bool { return p.Contains(ip) })
}

// nat64 has the IPv6 addresses that gateways translate to the IPv4 address in their last bytes (RFC 6052).
var nat64 = netip.MustParsePrefix("64:ff9b::/96")

// cloudLocal has the addresses, beside the link-local ones, at which clouds serve an instance its metadata,
// credentials and certificates.
var cloudLocal = []netip.Prefix{
	netip.MustParsePrefix("fd00:ec2::/32"),      // AWS, in IPv6
	netip.MustParsePrefix("fd20:ce::254/128"),   // Google Cloud, in IPv6
	netip.MustParsePrefix("168.63.129.16/32"),   // Azure
	netip.MustParsePrefix("100.100.100.200/32"), // Alibaba Cloud
}

// CheckSourceURL is CheckURL, but accepts http:// to any machine. It is for URLs that have a checksum beside them,
// and for the prefixes of sources. Whoever fetches decides whether plain http is followed.
func CheckSourceURL(s string) error {
	if !utf8.ValidString(s) {
		return fmt.Errorf("the URL %q is not UTF-8", clip(ShownURL(s))) // JSON would replace the invalid bytes
	}
	if strings.ContainsFunc(s, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsGraphic(r) }) {
		return fmt.Errorf("the URL contains white space or control characters")
	}
	u, err := url.Parse(s)
	if escape := url.EscapeError(""); errors.As(err, &escape) {
		return fmt.Errorf("the URL does not parse: %w: a %% is written as %%25", escape)
	}
	if err != nil {
		return errors.New("the URL does not parse: want SCHEME://HOST/PATH; it is not shown, as it may contain a password")
	}
	if u.User != nil {
		return fmt.Errorf("the URL carries a user name or password: use the environment or an instance role")
	}
	if strings.Contains(s, "#") {
		fragment := u.EscapedFragment()
		if strings.ContainsAny(fragment, "@=") {
			fragment = "…" // the rest of a password, or a token
		}
		return fmt.Errorf("the URL carries a fragment (#%s): a # in a path is written as %%23", fragment)
	}
	version := u.Scheme == "s3" && s3Version.MatchString(u.RawQuery)
	if (u.RawQuery != "" || u.ForceQuery) && u.Scheme != "https" && u.Scheme != "http" && !version {
		return fmt.Errorf("the URL carries a query, which a %s:// URL can't have: a ? in a path is written as %%3F", u.Scheme)
	}
	switch u.Scheme {
	case "s3", "gs", "https", "http":
		if u.Host == "" || strings.Trim(u.Path, "/") == "" {
			return fmt.Errorf("the URL needs a host or bucket and a path")
		}
	case "file":
		if u.Host != "" || !strings.Contains(s, ":///") || u.Path == "/" {
			return fmt.Errorf("a file URL is file:///ABSOLUTE/PATH")
		}
	case "":
		return fmt.Errorf("the URL has no scheme: want s3://, gs://, https:// or file://")
	default:
		return fmt.Errorf("the scheme %q is not one of s3, gs, https, file", u.Scheme)
	}
	return nil
}

// s3Version matches the one query that an s3:// URL may have: the version of the object.
var s3Version = regexp.MustCompile(`^versionId=[A-Za-z0-9._-]+$`)

// BesideURL returns a URL with more appended to the object's name. A query is kept, but not that of an s3:// URL: its
// versionId belongs to the first object.
func BesideURL(url, more string) string {
	at, query, found := strings.Cut(url, "?")
	if !found || strings.HasPrefix(url, "s3:") {
		return at + more
	}
	return at + more + "?" + query
}

// ShownURL returns a URL, or a text that should have been one, without what may be secret. It hides the user name, the
// password, the fragment, and the query, which may be a signature. In a text without :// whatever precedes an @ and has
// a colon counts as a user name and password, except in a pointer's digest.
func ShownURL(s string) string {
	s = safetext.URLs(s) // which knows where a password ends that should have been escaped
	rest, digest := s, ""
	if i := strings.LastIndex(s, digestMark); i >= 0 {
		rest, digest = s[:i], s[i:]
	}
	if i := strings.LastIndexByte(rest, '@'); i >= 0 && !strings.Contains(rest, "://") && strings.Contains(rest[:i], ":") {
		rest = "…" + rest[i:]
	}
	if i := strings.IndexAny(rest, "?#"); i >= 0 {
		return rest[:i+1] + "…"
	}
	return rest + digest
}

// String returns the pointer's text; "" for the zero pointer.
func (p Pointer) String() string {
	if p.IsZero() {
		return ""
	}
	return p.URL + digestMark + p.Digest.String()
}

// Version returns the version in the URL: the manifest's file name without extension or, for manifest.*, the name of
// its directory.
func (p Pointer) Version() string {
	url, _, _ := strings.Cut(p.URL, "?") // a query may be a signature
	dir, file := path.Split(url)
	version := strings.TrimSuffix(file, path.Ext(file))
	if parent := path.Base(dir); strings.HasPrefix(file, "manifest.") && parent != "." && parent != "/" {
		version = parent
	}
	return safetext.Line(safetext.Printable(version), maxVersion)
}

// maxVersion is how many bytes of a URL's version are shown.
const maxVersion = 200

// Short returns the pointer's name for people: its version and 8 digits of its digest; "-" for the zero pointer.
func (p Pointer) Short() string {
	if p.IsZero() {
		return "-"
	}
	return p.Version() + " " + p.Digest.Short()[:8]
}

// IsZero reports whether p is the zero pointer.
func (p Pointer) IsZero() bool { return p == Pointer{} }

func (p Pointer) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText parses a pointer; empty text gives the zero pointer.
func (p *Pointer) UnmarshalText(text []byte) (err error) {
	if len(text) == 0 {
		*p = Pointer{}
		return nil
	}
	*p, err = ParsePointer(string(text))
	return err
}

// Trim removes what people and tools leave in a value: white space and a byte-order mark around it, carriage returns
// at the ends of lines.
func Trim(s string) string {
	return strings.TrimSpace(strings.ReplaceAll(strings.TrimPrefix(strings.TrimSpace(s), "\ufeff"), "\r\n", "\n"))
}

// clip shortens a typed value for an error message.
func clip(s string) string { return safetext.Cut(s, 80) }
